"""The cost of a compiled program, from its instructions: matrix products, kernels, collectives, bytes.

Everything is of one device, and counts each iteration of a loop; loops of unknown length are left out.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxllm.model.kernels.grouped_triton import WEIGHT_GRADIENT
from jaxllm.plan.hlo import Instruction, Program, Shape, Step, match
from jaxllm.plan.hlo_grouped import grouped_bytes, grouped_flops, grouped_kernel

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")

_NO_KERNEL = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "async-start",
        "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency",
    }
)  # fmt: skip
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
_SLICES = ("dynamic-slice", "slice", "gather")


class Product(NamedTuple):
    """The matrix products of one kernel at one place of the program."""

    site: str  # the kernel's name in the program
    kernel: str  # a description of what computes them
    kind: str  # dot, grouped or attention
    flops: float  # of all calls
    calls: int
    shapes: tuple[tuple[int, ...], ...]  # output, then operands


class Kernel(NamedTuple):
    """The cost of one kernel over all its calls."""

    kind: str | None  # of its products; None: it has none
    flops: float
    bytes: float  # of device memory


class Collective(NamedTuple):
    kind: str
    calls: int
    bytes: float  # that the device sends in all calls, by the ring algorithms


def matrix_products(program: Program) -> Iterator[Product]:
    """The program's products, by kernel.

    A grouped product counts with all the rows that its tiles can hold at worst, causal attention with the half that is
    computed.
    """
    for step in program.steps():
        instruction = step.instruction
        if instruction.opcode == "dot":
            flops = _contracted(instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
            yield _product(step, _dot_kernel(step), "dot", flops)
        elif instruction.opcode == "convolution":  # a TPU's form of a dot
            yield _product(step, _dot_kernel(step), "dot", _convolved(instruction))
        elif instruction.opcode == "custom-call":
            target = match(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
            if target.startswith("__cublas"):
                flops = _contracted(instruction, r'"lhs_contracting_dimensions":\[([\d,"]*)\]')
                yield _product(step, "cuBLAS product", "dot", flops)
            elif target.startswith("__cudnn$fmha"):
                direction = "backward" if "Backward" in target else "forward"
                flops = _attention(instruction, {"forward": 2, "backward": 5}[direction])
                yield _product(step, f"cuDNN fused attention, {direction}", "attention", flops)
            elif name := grouped_kernel(instruction):
                kernel = "weight gradient" if name == WEIGHT_GRADIENT else "product"
                yield _product(step, f"Triton grouped {kernel}", "grouped", grouped_flops(instruction))


def _product(step: Step, kernel: str, kind: str, flops: float) -> Product:
    instruction = step.instruction
    shapes = [instruction.outputs[0].dims, *(operand[0].dims for operand in instruction.inputs if operand)]
    site = (step.fusion or instruction).name
    return Product(site, kernel, kind, step.times * flops, step.times, tuple(shapes))


def _dot_kernel(step: Step) -> str:
    triton = step.fusion is not None and '"kind":"__triton' in step.fusion.attributes
    return "XLA Triton product" if triton else "XLA product"


def _contracted(instruction: Instruction, dimensions: str) -> float:
    left = instruction.inputs[0][0].dims
    depth = math.prod(left[int(d)] for d in re.findall(r"\d+", match(dimensions, instruction.attributes)[1]))
    return 2.0 * instruction.outputs[0].size * depth


def _convolved(instruction: Instruction) -> float:
    """FLOPs without multiplications by padding: on a TPU, the batch dimensions of a dot are dilated."""
    labels = match(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    shapes = (instruction.inputs[0][0], instruction.inputs[1][0], instruction.outputs[0])
    left, right, out = (dict(zip(names, shape.dims, strict=True)) for names, shape in zip(labels, shapes, strict=True))
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", found[1] if found else ""))
    spatial = sorted(name for name in out if name.isdigit())

    def option(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    pairs = 1
    for axis, name in enumerate(spatial):
        low = int(option("pad", axis, "0_0").split("_")[0])
        stride, hole, spread = (int(option(key, axis, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        at = np.add.outer(np.arange(out[name]) * stride - low, np.arange(right[name]) * spread)
        pairs *= int(((at >= 0) & (at <= (left[name] - 1) * hole) & (at % hole == 0)).sum())
    return 2.0 * out["b"] * out["f"] * right["i"] * pairs


def _attention(instruction: Instruction, products: int) -> float:
    scores = match(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', instruction.attributes)[1]
    size = math.prod(int(d) for d in re.findall(r"\d+", scores))
    computed = 0.5 if re.search(r'"mask_type":\s*"CAUSAL"', instruction.attributes) else 1.0
    return computed * products * 2.0 * size * instruction.outputs[0].dims[-1]


def collectives(program: Program) -> list[Collective]:
    """The collectives of a program.

    An asynchronous pair counts once, where it starts. So does a TPU's collective in a chain of kernels, each of which
    names it. A TPU makes a scattered sum of an all-reduce.
    """
    found, chains = [], set()
    for step in program.steps():
        instruction, kind = step.instruction, step.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if chain := re.search(r'channel_id=(\d+).*\bchain_id="(\d+)"', instruction.attributes):
            if chain.groups() in chains:
                continue
            chains.add(chain.groups())
        if step.fusion and step.fusion.called("calls")[0].startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        if sent := _sent(kind, instruction, program.devices):
            found.append(Collective(kind, step.times, step.times * sent))
    return found


def _sent(kind: str, instruction: Instruction, devices: int) -> float:
    """Bytes that one device sends: in a ring, each part is passed on once."""
    data = instruction.inputs[:1] if kind == "ragged-all-to-all" else instruction.inputs  # the rest are offsets
    held = sum(shape.bytes for operand in data for shape in operand)
    if kind == "collective-permute":
        return held
    others = group_size(instruction, devices) - 1
    share = others / (others + 1)
    return held * {"all-gather": others, "all-reduce": 2 * share}.get(kind, share)


def group_size(instruction: Instruction, devices: int) -> int:
    """Devices of a group, given the number of all devices."""
    groups = instruction.attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return listed[1].count(",") + 1
    if counted := re.match(r"\[\d+,(\d+)\]", groups):  # [groups,size]<=[...]
        return int(counted[1])
    if meshed := re.match(r"@?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", groups):  # mesh['a'=2,'b'=4] {'b'}, or 'b':(1)2 of it
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", meshed[1]))
        axes = re.findall(r"'?([a-zA-Z_]\w*)'?(?::\(\d+\)(\d+))?", meshed[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def kernels(program: Program) -> list[Kernel]:
    """The program's kernels, with the memory that each reads and writes.

    Each operand and each result counts once, and of a slice only the slice: a kernel that reads a thing again moves
    more, a cache that still holds a result makes it less. A collective's memory counts too.
    """
    kinds: dict[str, str] = {}
    flops: dict[str, float] = defaultdict(float)
    for product in matrix_products(program):
        kinds[product.site] = product.kind
        flops[product.site] += product.flops
    moved: dict[str, float] = defaultdict(float)
    for step in program.steps():
        opcode = step.instruction.opcode
        is_kernel = opcode not in _NO_KERNEL and _ALLOCATION not in step.instruction.attributes
        if step.fusion is None and is_kernel and not opcode.endswith(("-done", "-update")):
            moved[step.instruction.name] += step.times * _kernel_bytes(program, step.instruction)
    return [Kernel(kinds.get(name), flops.get(name, 0.0), size) for name, size in moved.items()]


def _kernel_bytes(program: Program, instruction: Instruction) -> float:
    opcode, inputs = instruction.opcode, instruction.inputs
    if opcode in _SLICES:
        return 2 * _memory(instruction.outputs)
    if opcode == "dynamic-update-slice":
        return 2 * _memory(inputs[1])
    if opcode == "fusion":
        return _fusion_bytes(program.computations[instruction.called("calls")[0]], instruction)
    if opcode == "custom-call" and grouped_kernel(instruction):
        return grouped_bytes(instruction)
    outputs = instruction.outputs
    if opcode.endswith("-start"):  # its type repeats the operands
        outputs = outputs[:1] if opcode == "copy-start" else outputs[-1:]
    return _memory(outputs) + sum(map(_memory, inputs))


def _memory(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _fusion_bytes(body: tuple[Instruction, ...], fusion: Instruction) -> float:
    named = {instruction.name: instruction for instruction in body}
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)

    def read(name: str, whole: float) -> float:
        """Bytes of one parameter: whole, unless every use takes a slice or writes one into it."""
        total = 0.0
        for user in users.get(name, []):
            if user.opcode == "bitcast":
                total += read(user.name, whole)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += _memory(user.outputs)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return whole
        return min(total, whole)

    def written(name: str) -> float:
        instruction = named[name]
        if instruction.opcode == "tuple":
            return sum(written(operand) for operand in instruction.operands)
        if instruction.opcode == "bitcast" and instruction.operands[0] in named:
            return written(instruction.operands[0])
        if instruction.opcode == "dynamic-update-slice":
            return _memory(instruction.inputs[1])
        return _memory(instruction.outputs)

    parameters = {int(i.argument): i for i in body if i.opcode == "parameter"}
    total = sum(read(parameters[n].name, _memory(operand)) for n, operand in enumerate(fusion.inputs))
    root = next(instruction for instruction in body if instruction.is_root)
    return total + min(written(root.name), _memory(fusion.outputs))
