"""What a row found: a figure, the target that it is held against, and how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.timing import Spread


class Target(NamedTuple):
    limit: float
    at_least: bool  # else: at most

    def reached(self, value: float) -> float:
        """How much of the target a value reaches: 1 is all of it, more is better."""
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
    """Whether other programs can disturb it."""
    other_load: float = 0.0
    """Cores that other programs kept busy meanwhile, at worst."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.target.reached(self.value.median) >= 1


def at_least(limit: float) -> Target:
    return Target(limit, at_least=True)


def at_most(limit: float) -> Target:
    return Target(limit, at_least=False)
