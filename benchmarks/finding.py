"""The result of a row: a value, its target, and how it was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.timing import Spread


class Target(NamedTuple):
    limit: float
    at_least: bool  # else: at most

    def reached(self, value: float) -> float:
        """The fraction of the target that a value reaches: 1 or more is a pass."""
        return value / self.limit if self.at_least else self.limit / value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Finding:
    what: str
    ours: str
    yardstick: str
    value: Spread
    target: Target
    unit: str = "x"
    timed: bool = True
    """Whether it is a time, which other programs can disturb."""
    other_load: float = 0.0
    """The largest load of other programs during the measurement, in cores."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.target.reached(self.value.median) >= 1


def at_least(limit: float) -> Target:
    return Target(limit, at_least=True)


def at_most(limit: float) -> Target:
    return Target(limit, at_least=False)
