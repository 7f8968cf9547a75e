"""Which outputs of modules are compared: modules are partners if their parameters map onto each other, not by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from parity_tests.engine.mapping import TensorMap, regroups
from parity_tests.engine.order import iteration_of, path_of
from parity_tests.engine.record import Record


class Pairing(NamedTuple):
    pairs: list[tuple[str, str]]
    """Names of outputs, JAX's and PyTorch's, in PyTorch's order of computation."""
    alone: list[str]
    """Modules of PyTorch with parameters of their own that have no partner."""


def paired_outputs(jax: Record, torch: Record, mapping: TensorMap, run: str) -> Pairing:
    """The outputs of modules that hold the same parameters; of several around the same ones the innermost."""
    places = _places(jax)
    ours = _by_parameters(
        jax.runs[run].outputs,
        lambda path, iteration: frozenset(
            torch_name
            for name, entry in mapping.entries.items()
            if _inside(places[name], path)
            for torch_name in entry.image(iteration)
        ),
    )
    mapped = mapping.torch_names()
    theirs = _by_parameters(
        torch.runs[run].outputs, lambda path, _: frozenset(name for name in mapped if _inside(name, path))
    )
    sizes = {
        "jax": {key: value.shape for key, value in jax.runs[run].outputs.items()},
        "torch": {key: value.shape for key, value in torch.runs[run].outputs.items()},
    }
    pairs: list[tuple[str, str]] = []
    for parameters, our_paths in ours.items():
        if parameters not in theirs:
            continue
        their_paths = theirs[parameters]
        for one, other in _partners(list(our_paths.values()), list(their_paths.values())):
            fitting = [
                (a, b)
                for a, b in zip(one, other, strict=True)
                if layout(sizes["jax"][a], sizes["torch"][b]) is not None
            ]
            pairs += fitting if len(fitting) == len(one) else []
    place = {key: i for i, key in enumerate(torch.runs[run].outputs)}
    pairs.sort(key=lambda pair: place[pair[1]])
    reached = {path_of(key) for _, key in pairs}
    own = [module.path for module in torch.modules if any(name in mapped for name in module.own)]
    return Pairing(pairs, [path for path in own if path not in reached])


def _places(record: Record) -> dict[str, str]:
    """Each tensor with the path of its module and its own last name; linen's names begin with a collection."""
    return {
        name: f"{module.path}.{name.rpartition('.')[2]}".strip(".") for module in record.modules for name in module.own
    }


def _inside(place: str, around: str) -> bool:
    return not around or place == around or place.startswith(f"{around}.")


def _by_parameters(keys: Iterable[str], parameters_of) -> dict[frozenset[str], dict[tuple, list[str]]]:
    """Outputs by what their module holds, then by its path (and method, leaf and iteration), one for each call."""
    found: dict[frozenset[str], dict[tuple, list[str]]] = {}
    for key in keys:
        iteration = iteration_of(key)
        parameters = parameters_of(path_of(key), iteration)
        if parameters:
            label = key.rpartition("#")[0] if "#" in key else key
            found.setdefault(parameters, {}).setdefault((label,), []).append(key)
    return found


def _partners(ours: list[list[str]], theirs: list[list[str]]) -> list[tuple[list[str], list[str]]]:
    """Modules around the same parameters, from the innermost out: all where both sides have as many, else the first."""
    calls = [len(ours[0]), len(theirs[0])]
    if len(ours) != len(theirs):
        ours, theirs = ours[:1], theirs[:1]
    if calls[0] != calls[1]:
        return []
    return [(one, other) for one, other in zip(ours, theirs, strict=True) if len(one) == len(other)]


def layout(ours: tuple[int, ...], theirs: tuple[int, ...], channels_last: bool = False) -> tuple[int, ...] | None:
    """How to transpose JAX's output before a reshape to PyTorch's shape; None: they cannot be the same."""
    channels = (0, len(ours) - 1, *range(1, len(ours) - 1))
    if (
        len(ours) == len(theirs) >= 3
        and tuple(ours[axis] for axis in channels) == theirs
        and (channels_last or ours != theirs)
    ):
        return channels
    if len(ours) + 1 == len(theirs) and theirs[0] == 1:
        return layout(ours, theirs[1:], channels_last)
    return tuple(range(len(ours))) if ours == theirs or regroups(ours, theirs) else None


def fitted(ours: np.ndarray, theirs: np.ndarray, channels_last: bool = False) -> np.ndarray | None:
    """JAX's output in PyTorch's layout."""
    axes = layout(ours.shape, theirs.shape, channels_last)
    return None if axes is None else ours.transpose(axes).reshape(theirs.shape)
