"""A compiled program, read from XLA's text: its instructions, and how often each runs.

The compiled text is the only reliable source: the compiler replaces kernels, fuses, and recomputes.
Imports no JAX.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([^\s,(){}]+)")
_CALLED = {
    "call": ("to_apply", "calls"),
    "async-start": ("to_apply", "calls"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "fusion": ("calls",),
}
"""The attributes that name computations that run; the scalar computations of reductions, sorts and scatters do not
count."""
_SIZES = {"pred": 1.0, "bf16": 2.0, "c64": 8.0, "c128": 16.0, "token": 0.0, "opaque": 0.0}


class Shape(NamedTuple):
    """An array in a program."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False  # a TPU's layout puts it into on-chip memory

    @property
    def bytes(self) -> float:
        return self.size * element_bytes(self.dtype)

    @property
    def size(self) -> int:
        return math.prod(self.dims)


def match(pattern: str, text: str) -> re.Match[str]:
    """The first match of a pattern that every program of XLA contains; raises a ValueError if there is none."""
    if (found := re.search(pattern, text)) is None:
        raise ValueError(f"XLA's program has no {pattern} in {text[:200]}")
    return found


def element_bytes(dtype: str) -> float:
    """Of XLA's names: f32 is 4, s4 is 0.5, f8e4m3fn is 1."""
    return _SIZES[dtype] if dtype in _SIZES else int(match(r"\d+", dtype)[0]) / 8


def read_shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a type, from left to right; a tuple's are its leaves."""
    return tuple(
        Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), "T(" in layout and "S(" in layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    outputs: tuple[Shape, ...]
    operands: tuple[str, ...]
    inputs: tuple[tuple[Shape, ...], ...]
    """What each operand holds."""
    argument: str
    """The text between the parentheses: a constant's value, a parameter's number."""
    attributes: str
    """The text after them."""
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """The computations that these attributes name."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(%[^\s,)]+|\{{%[^}}]*\}})", self.attributes)
        return [name for group in found for name in _NAME.findall(group)]


class Step(NamedTuple):
    """An instruction where the program runs it."""

    instruction: Instruction
    times: int  # in a run of the program
    fusion: Instruction | None  # the kernel that it is a part of; None: it is a kernel itself


@dataclass(frozen=True)
class Program:
    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    devices: int

    def steps(self) -> Iterator[Step]:
        """Every instruction that runs, callers first; all branches, but not loops of unknown length."""
        return self._visit(self.entry, 1, None)

    def _visit(self, name: str, times: int, fusion: Instruction | None) -> Iterator[Step]:
        for instruction in self.computations[name]:
            yield Step(instruction, times, fusion)
            if instruction.opcode == "while" and (trips := self.trip_count(instruction)) is not None:
                yield from self._visit(instruction.called("body")[0], times * trips, fusion)
            elif instruction.opcode in _CALLED:
                kernel = (fusion or instruction) if instruction.opcode == "fusion" else fusion
                for called in instruction.called(*_CALLED[instruction.opcode]):
                    yield from self._visit(called, times, kernel)

    def trip_count(self, loop: Instruction) -> int | None:
        """Iterations of a `while`, as annotated by XLA or from a scan's counter and its bound; None: unknown."""
        if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        condition = {i.name: i for i in self.computations[loop.called("condition")[0]]}
        compare = next(i for i in condition.values() if i.is_root)
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        caller = next(c for c in self.computations.values() if loop in c)
        before = {i.name: i for i in caller}
        start = before.get(loop.operands[0])

        def value(name: str, inside: dict[str, Instruction]) -> int | None:
            found = inside.get(name)
            if found is None:
                return None
            if found.opcode == "constant":
                return int(found.argument) if found.argument.lstrip("-").isdigit() else None
            if found.opcode in ("copy", "bitcast", "convert"):
                return value(found.operands[0], inside)
            if found.opcode == "get-tuple-element" and inside is condition and start and start.opcode == "tuple":
                return value(start.operands[int(match(r"index=(\d+)", found.attributes)[1])], before)
            return None

        first, last = (value(operand, condition) for operand in compare.operands)
        return None if first is None or last is None else max(0, last - first)

    def unknown_loops(self) -> int:
        """Loops that `steps` leaves out, such as loops over the rows that a router sends to an expert."""
        loops = (step.instruction for step in self.steps() if step.instruction.opcode == "while")
        return sum(self.trip_count(loop) is None for loop in loops)


def read_program(text: str) -> Program:
    """Read what `jax.stages.Compiled.as_text` writes."""
    computations: dict[str, list[Instruction]] = {}
    entry, body, shapes = "", [], {}
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%(\S+) \(", line)):
            body, shapes = computations.setdefault(header[2], []), {}
            entry = header[2] if header[1] else entry
        elif line.startswith("  ") and " = " in line and (read := _read_instruction(line, shapes)):
            body.append(read)
            shapes[read.name] = read.outputs
    first_line = text.partition("\n")[0]
    counts = (re.search(rf"{kind}=(\d+)", first_line) for kind in ("num_partitions", "replica_count"))
    devices = math.prod(int(count[1]) for count in counts if count)
    return Program(entry, {name: tuple(read) for name, read in computations.items()}, devices)


def _read_instruction(line: str, shapes: dict[str, tuple[Shape, ...]]) -> Instruction | None:
    named, _, rest = line.strip().partition(" = ")
    name = named.removeprefix("ROOT ").removeprefix("%")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r" ([\w-]+)\(", rest[end:])
    if opcode is None:
        return None
    opened = end + opcode.end() - 1
    closed = _closing(rest, opened)
    argument = rest[opened + 1 : closed]
    operands = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(argument))
    return Instruction(
        name=name,
        opcode=opcode[1],
        outputs=read_shapes(rest[:end]),
        operands=operands,
        inputs=tuple(shapes.get(operand, ()) for operand in operands),
        argument=argument,
        attributes=rest[closed + 1 :],
        is_root=named.startswith("ROOT "),
    )


def _closing(text: str, opened: int) -> int:
    """The position of the parenthesis that closes the one at `opened`."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text)
