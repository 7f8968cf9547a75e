"""The grouped products of `jaxllm.model.kernels.grouped_triton` in a compiled program: FLOPs, and memory that moves.

They read and write parts of arrays of all layers, which the program does not say: a part is of one layer's experts.

    M rows    E groups    S groups of an array    L layers
"""

import math
import re
from typing import NamedTuple

from jaxllm.model.kernels.grouped_triton import TILE, WEIGHT_GRADIENT, is_kernel, operand_names
from jaxllm.plan.hlo import Instruction, Shape


class _Call(NamedTuple):
    """A call of a kernel, with its operands by name."""

    kernel: str
    names: list[str]
    shapes: list[Shape]  # of the operands; rows that are read from tokens as if they were sorted
    outputs: tuple[Shape, ...]

    def shapes_of(self, name: str) -> list[Shape]:
        return [shape for known, shape in zip(self.names, self.shapes, strict=True) if known == name]

    @property
    def rows(self) -> int:
        """M."""
        return max(shape.dims[0] for shape in self.shapes_of("rows"))

    @property
    def groups(self) -> int:
        """E, from the number of groups, or of tiles, which is one more for each group."""
        if starts := self.shapes_of("group_start"):
            return starts[0].dims[0]
        return self.shapes_of("tile_start")[0].dims[0] + self.rows // -TILE

    def moved(self, shape: Shape) -> float:
        """Bytes of an array, or of the part of it that belongs to one layer: one of L, or E of S."""
        if len(shape.dims) < 3:
            return shape.bytes
        return shape.bytes * (1 if shape in self.shapes_of("saved") else self.groups) / shape.dims[0]


def grouped_kernel(instruction: Instruction) -> str | None:
    """The kernel's name, if it is one of these."""
    found = re.search(r"[/(](grouped_\w+)[/)]", instruction.attributes)
    return found[1] if found and is_kernel(found[1]) else None


def grouped_flops(instruction: Instruction) -> float:
    """For the maximum number of rows that the tiles can hold."""
    call = _call(instruction)
    most = (-(-call.rows // TILE) + call.groups) * TILE
    if call.kernel == WEIGHT_GRADIENT:
        return 2.0 * most * math.prod(shape.dims[1] for shape in call.shapes_of("rows"))
    return sum(2.0 * most * math.prod(shape.dims[1:]) for shape in call.shapes_of("weights"))


def grouped_bytes(instruction: Instruction) -> float:
    """Each row and each result once; of an array of all layers, one layer's part. A token counts once for each row."""
    call = _call(instruction)
    aliasing = instruction.attributes.partition("output_to_operand_aliasing={")[2].partition("}}")[0]
    written_in_place = {int(operand) for operand in re.findall(r"\((\d+),", aliasing)}
    read = [shape for i, shape in enumerate(call.shapes) if i not in written_in_place]
    return sum(map(call.moved, (*read, *call.outputs)))


def _call(instruction: Instruction) -> _Call:
    kernel, shapes = grouped_kernel(instruction) or "", [operand[0] for operand in instruction.inputs]
    names = operand_names(kernel, [len(shape.dims) for shape in shapes])
    if "tokens" in names:
        (M,) = shapes[names.index("tokens")].dims
        for i, name in enumerate(names):
            if name == "rows":
                shapes[i] = shapes[i]._replace(dims=(M, *shapes[i].dims[1:]))
    return _Call(kernel, names, shapes, instruction.outputs)
