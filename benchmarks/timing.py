"""Contenders in turn, A B A B, and the ratio of their times with its spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.worker import Run

Runs = Mapping[str, Sequence[Run]]

QUIET = 0.1
"""A round is quiet when other programs kept at most this many cores busy in each of its runs."""

ATTEMPTS = 2
"""A row may take this many times its rounds to find quiet ones; a single round is not repeated."""


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))


def interleave(
    contenders: Mapping[str, Callable[[], Run]], rounds: int, warmups: int = 1, untimed: int = 0
) -> dict[str, list[Run]]:
    """Run all contenders in turn, again and again.

    A round that other programs disturbed is repeated, up to a limit; the quietest rounds are kept, chosen by the load
    of other programs and not by the times.

    Args:
        contenders: by name.
        rounds: turns of each that are kept.
        warmups: turns before the first that counts.
        untimed: runs at the beginning of each turn that do not count: where memory lay idle, the first run pays for
            pages that the kernel, or the host of a virtual machine, took back. Work without a pause does not.

    Returns:
        Of each contender `rounds` runs; those at one index were neighbours in time.
    """
    for _ in range(warmups):
        for go in contenders.values():
            go()
    made: list[dict[str, Run]] = []
    most = ATTEMPTS * rounds if rounds > 1 else 1
    while len(made) < most and sum(disturbance(runs) <= QUIET for runs in made) < rounds:
        made.append({name: _turn(go, untimed) for name, go in contenders.items()})
    kept = sorted(made, key=disturbance)[:rounds]
    return {name: [runs[name] for runs in kept] for name in contenders}


def _turn(go: Callable[[], Run], untimed: int) -> Run:
    for _ in range(untimed):
        go()
    return go()


def disturbance(runs: Mapping[str, Run]) -> float:
    """The largest load of other programs in one round, in cores."""
    return max(run.other_load for run in runs.values())


def other_load(runs: Runs) -> float:
    """The largest load of other programs during any kept run, in cores."""
    return max(run.other_load for side in runs.values() for run in side)


def seconds(runs: Sequence[Run]) -> Spread:
    return Spread.of([run.seconds for run in runs])


def ratio(over: Sequence[Run], under: Sequence[Run]) -> Spread:
    """How many times the time of `under` that `over` took, pair by pair."""
    return Spread.of([a.seconds / b.seconds for a, b in zip(over, under, strict=True)])


def cpu_ratio(over: Sequence[Run], under: Sequence[Run]) -> float:
    """The same of the CPU seconds: median only."""
    return Spread.of([a.cpu_seconds / b.cpu_seconds for a, b in zip(over, under, strict=True)]).median


def fastest(runs: Runs, names: Sequence[str]) -> str:
    return min(names, key=lambda name: seconds(runs[name]).median)
