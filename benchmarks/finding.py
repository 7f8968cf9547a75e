"""A line of the table: a measurement, its yardstick, their ratio and its target."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from benchmarks.timing import Runs, Spread, other_load, ratio, seconds
from benchmarks.worker import Failure


class Target(NamedTuple):
    limit: float
    at_least: bool  # else: at most

    def reached(self, value: float) -> float:
        """The fraction of the target that a value reaches: 1 or more is a pass."""
        return value / self.limit if self.at_least else self.limit / value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


at_least, at_most = partial(Target, at_least=True), partial(Target, at_least=False)


@dataclass(frozen=True)
class Finding:
    what: str
    ours: str
    yardstick: str = ""
    value: Spread | float | None = None  # the ratio of pairs of times, or one number; None: nothing to compare with
    target: Target | None = None
    judged: float | None = None  # the number that the target is about; None: the value
    unit: str = "x"
    other_load: float = 0.0  # the largest load of other programs during the measurement, in cores
    details: dict[str, Any] = field(default_factory=dict)  # the numbers, for programs

    def __post_init__(self) -> None:
        value = self.value._asdict() if isinstance(self.value, Spread) else self.value
        figures = {"value": value, "judged": self.judged, "other_load": self.other_load, **self.details}
        for name, number in _numbers(figures, ""):
            if not math.isfinite(number):  # JSON has no such numbers, and no verdict about them is right
                raise Failure(f"{self.what}: {name} is {number}")

    @property
    def timed(self) -> bool:
        """Whether it is a time, which other programs can disturb."""
        return isinstance(self.value, Spread)

    @property
    def spread(self) -> Spread | None:
        return self.value if self.value is None or isinstance(self.value, Spread) else Spread(*3 * (self.value,))

    @property
    def shown(self) -> str:
        """The value, with its quartiles if it has any."""
        if self.spread is None:
            return ""
        median, low, high = self.spread
        unit = self.unit if self.unit == "x" else f" {self.unit}"
        return f"{median:.2f}{unit}" + (f" ({low:.2f} - {high:.2f})" if self.timed else "")

    @property
    def reached(self) -> float | None:
        """The fraction of the target that is reached; None: there is no target, or nothing to judge."""
        value = self.judged if self.judged is not None or self.spread is None else self.spread.median
        return None if self.target is None or value is None else self.target.reached(value)

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return ""
        return "reached" if self.reached >= 1 else f"{self.reached:.2f} of it"

    @property
    def goal(self) -> str:
        """The target with the verdict; empty: there is none."""
        return f"{self.target}: {self.verdict}" if self.verdict else ""


class Found(NamedTuple):
    """What a row found."""

    findings: list[Finding]
    not_measured: str  # the reason in one line; empty: it was measured
    seconds: float


def compare(
    what: str, runs: Runs, ours: str, yardstick: str, target: Target, show: str, show_yardstick: str = "",
    work: float = 1.0, **details: Any,
) -> Finding:  # fmt: skip
    """The time of `ours` over that of the yardstick, or with a target of at least something the reverse: the speed.

    `ours` and `yardstick` are names of runs. `show` is a format of a run's seconds `s` or `ms`, of its `rate`, that is
    `work` a second, and of its `name`, or its `form`: the name without the first word.
    """
    over, under = (runs[name] for name in ((yardstick, ours) if target.at_least else (ours, yardstick)))
    times, shown = {name: seconds(side) for name, side in runs.items()}, []
    if all(run.cpu_seconds for run in (*over, *under)):  # else the seconds are those of one unit of work
        of_cpu = Spread.of([a.cpu_seconds / b.cpu_seconds for a, b in zip(over, under, strict=True)])
        details |= {"cpu_ratio": of_cpu.median, "seconds": {name: spread._asdict() for name, spread in times.items()}}
    for name, form in ((ours, show), (yardstick, show_yardstick or show)):
        s = times[name].median
        shown.append(form.format(s=s, ms=1e3 * s, rate=work / s, name=name, form=name.partition(" ")[2]))
    return Finding(what, *shown, ratio(over, under), target, other_load=other_load(runs), details=details)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested figures, each with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (int, float)):
        yield name, value
