"""Interleaved timing (A B A B) of contenders, and the ratio of their times with its spread."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Self

import numpy as np

from benchmarks.worker import Run, Worker

Runs = Mapping[str, Sequence[Run]]

QUIET = 0.1  # a round is quiet if other programs used at most this many cores in each of its runs
ATTEMPTS = 2  # a row may run this many times its rounds to find quiet ones; a single round is not repeated


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))


@contextmanager
def ready(**workers: Worker) -> Iterator[dict[str, Callable[[], Run]]]:
    """Wait for workers, which prepare at the same time; yields their contenders, or raises a Failure."""
    with ExitStack() as stack:
        for worker in workers.values():
            stack.push(worker)  # all end, also if one could not prepare
        for worker in workers.values():
            worker.__enter__()
        yield contenders_of(**workers)


def contenders_of(**workers: Worker) -> dict[str, Callable[[], Run]]:
    """What workers that are ready can do, as `WORKER NAME`."""
    return {
        f"{side} {name}": functools.partial(worker.go, name)
        for side, worker in workers.items()
        for name in worker.contenders
    }


def interleave(
    contenders: Mapping[str, Callable[[], Run]], rounds: int, warmups: int = 1, untimed: int = 0
) -> dict[str, list[Run]]:
    """Run all contenders in turn, round after round; those with the same index were made in the same round.

    A round that other programs disturbed is repeated, up to a limit. The quietest `rounds` are kept. They are chosen by
    the load of other programs, not by their times.

    Args:
        warmups: rounds before the first measured one.
        untimed: runs at the beginning of each turn. After a pause, the first run is slower: it pays for pages that the
            kernel, or the host of a virtual machine, has reclaimed.
    """
    for _ in range(warmups):
        for go in contenders.values():
            go()
    made: list[Runs] = []
    limit = ATTEMPTS * rounds if rounds > 1 else 1
    while len(made) < limit and sum(other_load(a_round) <= QUIET for a_round in made) < rounds:
        made.append({name: [go() for _ in range(untimed + 1)][-1:] for name, go in contenders.items()})
    kept = sorted(made, key=other_load)[:rounds]
    return {name: [run for a_round in kept for run in a_round[name]] for name in contenders}


def other_load(runs: Runs) -> float:
    """The largest load of other programs during any of the runs, in cores."""
    return max(run.other_load for side in runs.values() for run in side)


def seconds(runs: Sequence[Run]) -> Spread:
    return Spread.of([run.seconds for run in runs])


def ratio(over: Sequence[Run], under: Sequence[Run]) -> Spread:
    """The time of `over` divided by that of `under`, pair by pair."""
    return Spread.of([a.seconds / b.seconds for a, b in zip(over, under, strict=True)])


def fastest(runs: Runs, names: Sequence[str]) -> str:
    return min(names, key=lambda name: seconds(runs[name]).median)
