"""Names of outputs, and the order in which modules ran."""

from __future__ import annotations

import re
from collections.abc import Callable

from parity_tests.engine.record import Module

ROOT = "(root)"

_CALL_OF = re.compile(r"(\(\)\w+)?(:\d+)?(\[\d+\])*(#\d+)?$")


def path_of(key: str) -> str:
    """The module's path from the name of one of its outputs."""
    path = _CALL_OF.sub("", key)
    return "" if path == ROOT else path


def output_name(path: str, method: str) -> str:
    """`path`, or `path()method` for a method other than `__call__`."""
    return (path or ROOT) + ("" if method == "__call__" else f"(){method}")


def numbered(name: str, call: int) -> str:
    """The name of the n-th call, counted from 0."""
    return f"{name}#{call + 1}" if call else name


def iteration_of(key: str) -> int | None:
    """The iteration of a scan in which an output was made; of nested scans the outer one."""
    found = _CALL_OF.search(key)
    match = re.search(r"\[(\d+)\]", found[0]) if found else None
    return int(match[1]) if match else None


def ordered_modules(
    executed: list[str], tensors: list[str], owner: Callable[[str], str], kinds: dict[str, str]
) -> list[Module]:
    """The modules that own tensors, in order of execution, one in a scan once for each iteration.

    One that was not called itself stands before the nearest module around it that was.
    """
    first: dict[str, dict[int | None, int]] = {}
    for i, key in enumerate(executed):
        first.setdefault(path_of(key), {}).setdefault(iteration_of(key), i)
    owned: dict[str, list[str]] = {}
    for name in tensors:
        owned.setdefault(owner(name), []).append(name)
    found: list[tuple[float, Module]] = []
    for path, own in owned.items():
        around = path
        while around not in first and around:
            around = around.rpartition(".")[0]
        for iteration, place in first.get(around, {None: len(executed)}).items():
            module = Module(path, kinds.get(path, ""), own, iteration)
            found.append((place - (0.5 if around != path else 0), module))
    return [module for _, module in sorted(found, key=lambda placed: placed[0])]
