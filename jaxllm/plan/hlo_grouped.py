"""The grouped products of `jaxllm.model.kernels.grouped_triton` in a compiled program: FLOPs, and memory that moves.

They read and write parts of stacks of all layers, which the program does not say: a part is of one layer's experts.

    N tokens    M rows    E groups    S groups of a stack    L layers
"""

import math
import re

from jaxllm.model.kernels.grouped_triton import TILE
from jaxllm.plan.hlo import Instruction, Shape

WEIGHT_GRADIENT = "grouped_weight_gradient"

# Where each kernel has its rows, among its operands; the operands after them are weights or gradients. If it reads the
# rows from the tokens, the token of each row comes first.
_ROWS = {
    "grouped_product_swiglu_gradients": 5,
    "grouped_product_swiglu": 5,
    "grouped_product_transposed": 3,
    "grouped_product": 3,
    WEIGHT_GRADIENT: 3,
}


def grouped_kernel(instruction: Instruction) -> str | None:
    """The kernel's name, if it is one of these."""
    found = re.search(r"/(grouped_\w+)/", instruction.attributes)
    return found[1] if found and found[1] in _ROWS else None


def grouped_flops(instruction: Instruction) -> float:
    """With all the rows that the tiles can hold at worst."""
    rows, *others = _rows_and_others(instruction)
    kept = _kept(instruction)
    most = (-(-rows.dims[0] // TILE) + _groups(instruction)) * TILE
    if grouped_kernel(instruction) == WEIGHT_GRADIENT:
        return 2.0 * most * rows.dims[1] * others[0].dims[1]
    return sum(2.0 * most * math.prod(shape.dims[1:]) for shape in others if shape != kept)


def grouped_bytes(instruction: Instruction) -> float:
    """Each row and each result once, and of a stack the part of one layer. A token is read for each of its rows."""
    aliasing = instruction.attributes.partition("output_to_operand_aliasing={")[2].partition("}}")[0]
    written_in_place = {int(operand) for operand in re.findall(r"\((\d+),", aliasing)}
    read = [shape for i, shape in enumerate(_operands(instruction)) if i not in written_in_place]
    return sum(_part(instruction, shape) for shape in (*read, *instruction.outputs))


def _operands(instruction: Instruction) -> list[Shape]:
    """With the rows as if they were sorted, where they are read from the tokens."""
    shapes = [operand[0] for operand in instruction.inputs]
    first = _ROWS[grouped_kernel(instruction) or ""]
    if len(shapes[first].dims) == 1:
        M, count = shapes[first].dims[0], 2 if grouped_kernel(instruction) == WEIGHT_GRADIENT else 1
        for i in range(first + 1, first + 1 + count):
            shapes[i] = shapes[i]._replace(dims=(M, *shapes[i].dims[1:]))
    return shapes


def _rows_and_others(instruction: Instruction) -> list[Shape]:
    shapes, first = _operands(instruction), _ROWS[grouped_kernel(instruction) or ""]
    return shapes[first:] if len(shapes[first].dims) > 1 else shapes[first + 1 :]


def _groups(instruction: Instruction) -> int:
    """E, from the number of tiles or of groups, which is that of the first operand."""
    first = instruction.inputs[0][0].dims[0]
    if grouped_kernel(instruction) == WEIGHT_GRADIENT:
        return first
    return first + _rows_and_others(instruction)[0].dims[0] // -TILE


def _kept(instruction: Instruction) -> Shape | None:
    """The stack of pre-activations (L,M,2F): the last operand of the kernels of SwiGLU, if they keep them."""
    name, others = grouped_kernel(instruction), _rows_and_others(instruction)[1:]
    keeps = name == "grouped_product_swiglu_gradients" or (name == "grouped_product_swiglu" and len(others) == 3)
    return others[-1] if keeps else None


def _part(instruction: Instruction, shape: Shape) -> float:
    if len(shape.dims) < 3:
        return shape.bytes
    return shape.bytes * (1 if shape == _kept(instruction) else _groups(instruction)) / shape.dims[0]
