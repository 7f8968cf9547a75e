"""Interleaved timing (A B A B) of contenders, and the ratio of their times with its spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.worker import Run

Runs = Mapping[str, Sequence[Run]]

QUIET = 0.1
"""A round is quiet if other programs used at most this many cores in each of its runs."""

ATTEMPTS = 2
"""A row may run this many times its rounds to find quiet ones; a single round is not repeated."""


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
    """Run all contenders in turn, round after round.

    A round that other programs disturbed is repeated, up to a limit. The quietest rounds are kept. They are chosen by
    the load of other programs, not by their times.

    Args:
        contenders: by name.
        rounds: the number of rounds to keep.
        warmups: the number of rounds before the first measured one.
        untimed: the number of untimed runs at the beginning of each turn. After a pause, the first run is slower: it
            pays for pages that the kernel, or the host of a virtual machine, has reclaimed.

    Returns:
        `rounds` runs of each contender; runs with the same index were made in the same round.
    """
    for _ in range(warmups):
        for go in contenders.values():
            go()
    made: list[dict[str, Run]] = []
    limit = ATTEMPTS * rounds if rounds > 1 else 1
    while len(made) < limit and sum(disturbance(runs) <= QUIET for runs in made) < rounds:
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
    """The time of `over` divided by that of `under`, pair by pair."""
    return Spread.of([a.seconds / b.seconds for a, b in zip(over, under, strict=True)])


def cpu_ratio(over: Sequence[Run], under: Sequence[Run]) -> float:
    """The median of the same ratio for CPU seconds."""
    return Spread.of([a.cpu_seconds / b.cpu_seconds for a, b in zip(over, under, strict=True)]).median


def fastest(runs: Runs, names: Sequence[str]) -> str:
    return min(names, key=lambda name: seconds(runs[name]).median)
