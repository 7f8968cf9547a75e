"""The names of both sides: which tensors of PyTorch a tensor of JAX is made of, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.errors import UserError, listed, shown
from parity_tests.engine.record import Lazy, Named

CONVOLUTIONS = {"conv1d": (2, 1, 0), "conv2d": (2, 3, 1, 0), "conv3d": (2, 3, 4, 1, 0)}
"""PyTorch's kernel (out, in, *spatial) as JAX's (*spatial, in, out)."""

OPERATIONS = (
    '"T", "conv1d", "conv2d", "conv3d", "stack", ("join", axis), ("part", axis, i, n), ("take", axis, indices), '
    '("flip", axes), ("transpose", axes), ("reshape", shape), ("add", number), or a function of NumPy arrays'
)

Operation = str | tuple[Any, ...] | Callable[..., np.ndarray]


@dataclass(frozen=True)
class Entry:
    """A tensor of JAX from tensors of PyTorch: operations in order, then a reshape that splits or merges axes."""

    jax: str
    torch: tuple[str, ...]
    operations: tuple[Operation, ...] = ()

    def made(self, arrays: Sequence[np.ndarray], shape: tuple[int, ...], *, linear: bool = False) -> np.ndarray:
        """The JAX tensor, or with `linear` its change: without what is added.

        Raises:
            UserError: the result does not have the shape of JAX's tensor.
        """
        found = list(arrays)
        for operation in self.operations:
            if not (linear and isinstance(operation, tuple) and operation[0] == "add"):
                found = [_applied(operation, found, self)]
        if len(found) != 1:
            raise UserError(f'mapping of {self.jax}: it has {len(found)} tensors; say "stack" or ("join", axis)')
        (array,) = found
        if array.shape == shape:
            return array
        if not regroups(array.shape, shape):
            given = ", ".join(str(list(a.shape)) for a in arrays)
            raise UserError(
                f"mapping of {self.jax}: {', '.join(self.torch)} of shape {given} becomes {list(array.shape)}, and JAX "
                f"has {list(shape)}: choose among {OPERATIONS}"
            )
        return array.reshape(shape)

    def sources(self, shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> np.ndarray:
        """For each element of the JAX tensor, its place in the PyTorch tensors laid end to end."""
        starts = np.cumsum([0, *(math.prod(s) for s in shapes)])
        arrays = [np.arange(math.prod(s)).reshape(s) + start for s, start in zip(shapes, starts[:-1], strict=True)]
        return self.made(arrays, shape, linear=True)

    def places(self, shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> np.ndarray | None:
        """`sources`; None where a function of the mapping computes new numbers, in which no element has a place."""
        try:
            found = self.sources(shapes, shape)
        except UserError:
            raise
        except Exception:  # a function may not take whole numbers
            return None
        size = sum(math.prod(s) for s in shapes)
        is_a_place = found.dtype.kind == "i" and (not found.size or (found.min() >= 0 and found.max() < size))
        return found if is_a_place else None

    def image(self, iteration: int | None) -> tuple[str, ...]:
        """The PyTorch tensors that an iteration of a scan uses."""
        stacked = self.operations[:1] == ("stack",) and iteration is not None and iteration < len(self.torch)
        return (self.torch[iteration],) if stacked and iteration is not None else self.torch

    def spelled(self) -> str:
        said = [op if isinstance(op, str) else "function" if callable(op) else str(op) for op in self.operations]
        first, *more = self.torch
        return " ".join([first + (f" and {len(more)} more" if more else ""), *said])


@dataclass
class TensorMap:
    """All entries, what is without a partner, and what the proposal is not sure of."""

    entries: dict[str, Entry]
    without_jax: list[str] = field(default_factory=list)
    """PyTorch's tensors that no JAX tensor is made of."""
    without_torch: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    proposed: bool = False

    def torch_names(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self.entries.values() for name in entry.torch))

    def to_jax(self, values: Named, shapes: Mapping[str, tuple[int, ...]]) -> Named:
        """PyTorch's values by JAX's names and in JAX's layout."""

        def made(name: str) -> np.ndarray:
            entry = self.entries[name]
            return entry.made([np.asarray(values[torch]) for torch in entry.torch], shapes[name])

        return Lazy(self.entries, made)

    def partly(self, jax: Named, torch: Named) -> dict[str, np.ndarray]:
        """PyTorch's tensors some of whose elements are in no JAX tensor, and which elements: True in a tensor's shape.

        Only an operation that chooses elements can leave some out. Tensors that a function computes with are taken as
        whole.
        """
        entries = list(self.entries.values())
        chosen = {name for entry in entries if any(map(_chooses, entry.operations)) for name in entry.torch}
        alone = {name: np.ones(np.shape(torch[name]), bool) for name in chosen}
        for entry in entries:
            if chosen.isdisjoint(entry.torch):
                continue
            shapes = [np.shape(torch[name]) for name in entry.torch]
            places, start = entry.places(shapes, np.shape(jax[entry.jax])), 0
            for name, shape in zip(entry.torch, shapes, strict=True):
                if name in chosen:
                    these = np.arange(start, start + math.prod(shape))
                    alone[name] &= places is not None and ~np.isin(these, places).reshape(shape)
                start += math.prod(shape)
        return {name: left for name, left in alone.items() if left.any()}

    def spelled(self) -> dict[str, Any]:
        """As JSON: what `read_mapping` reads again.

        Raises:
            UserError: an operation is a function.
        """
        for entry in self.entries.values():
            if any(callable(op) for op in entry.operations):
                raise UserError(
                    f"mapping of {entry.jax} has a function, which a record cannot hold: choose among {OPERATIONS}"
                )
        return {name: [list(entry.torch), *entry.operations] for name, entry in self.entries.items()}


def read_mapping(
    given: Mapping[str, Any],
    jax_shapes: Mapping[str, tuple[int, ...]],
    torch_shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
) -> TensorMap:
    """A mapping written as a dict, or read from a record.

    Raises:
        UserError: a name does not exist, or a shape does not fit.
    """
    entries = {}
    for name, value in given.items():
        if name not in jax_shapes:
            raise UserError(f"mapping: the JAX side has no tensor {shown(name)}; it has {listed(jax_shapes)}")
        first, *operations = (value,) if isinstance(value, str) else value
        names = _expanded([first] if isinstance(first, str) else list(first), [*torch_shapes, *aliases])
        names = [aliases.get(torch, torch) for torch in names]
        for torch in names:
            if torch not in torch_shapes:
                raise UserError(
                    f"mapping of {name}: the PyTorch side has no tensor {shown(torch)}; it has {listed(torch_shapes)}"
                )
        operations = tuple(tuple(op) if isinstance(op, list) else op for op in operations)
        entries[name] = Entry(name, tuple(names), operations)
        shapes = [torch_shapes[torch] for torch in names]
        entries[name].made([np.broadcast_to(np.float32(0), shape) for shape in shapes], jax_shapes[name])
    used = {torch for entry in entries.values() for torch in entry.torch}
    return TensorMap(
        entries,
        without_jax=[name for name in torch_shapes if name not in used],
        without_torch=[name for name in jax_shapes if name not in entries],
    )


def _chooses(operation: Operation) -> bool:
    return callable(operation) or operation[0] in ("part", "take")


def _expanded(names: Iterable[str], known: list[str]) -> list[str]:
    """Names with `*` stand for all that have a number there, in the order of the numbers."""
    found = []
    for name in names:
        if "*" not in name:
            found.append(name)
            continue
        pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)"))
        matches = sorted((list(map(int, m.groups())), n) for n in known if (m := pattern.fullmatch(n)))
        if not matches:
            raise UserError(f"mapping: no tensor of the PyTorch side is called {name}")
        found += [n for _, n in matches]
    return found


def _applied(operation: Operation, arrays: list[np.ndarray], entry: Entry) -> np.ndarray:
    if callable(operation):
        return np.asarray(operation(*arrays))
    name, *arguments = (operation,) if isinstance(operation, str) else operation
    try:
        if name == "stack":
            return np.stack(arrays)
        if name == "join":
            return np.concatenate(arrays, arguments[0])
        (array,) = arrays
        if name == "T":
            return array.swapaxes(-1, -2)
        if name in CONVOLUTIONS:
            axes = CONVOLUTIONS[name]
            kept = array.ndim - len(axes)  # an axis of a stack
            return array.transpose(*range(kept), *(axis + kept for axis in axes))
        if name == "transpose":
            return array.transpose(*arguments)
        if name == "reshape":
            return array.reshape(*arguments)
        if name == "part":
            axis, i, count = arguments
            return np.split(array, count, axis)[i]
        if name == "take":
            axis, indices = arguments
            return array.take(np.asarray(indices), axis)
        if name == "flip":
            return np.flip(array, *arguments)
        if name == "add":
            return array + np.asarray(arguments[0], array.dtype)
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"mapping of {entry.jax}: {shown(operation)} is not possible ({error})") from None
    raise UserError(f"mapping of {entry.jax}: {shown(operation)} is not an operation; choose among {OPERATIONS}")


def regroups(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a reshape only splits axes or merges neighbours."""
    a, b = [n for n in one if n != 1], [n for n in other if n != 1]
    i = j = 0
    while i < len(a) and j < len(b):
        left, right, taken = a[i], b[j], [1, 1]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(a):
                left, i, taken[0] = left * a[i], i + 1, taken[0] + 1
            elif right < left and j < len(b):
                right, j, taken[1] = right * b[j], j + 1, taken[1] + 1
            else:
                return False
        if min(taken) > 1:
            return False
    return i == len(a) and j == len(b)
