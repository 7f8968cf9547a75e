"""The result of a row: a value, its target, and how it was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.timing import Spread
from benchmarks.worker import Failure


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

    def __post_init__(self) -> None:
        check_finite(self.what, {"value": self.value._asdict(), "other_load": self.other_load, **self.details})

    @property
    def passed(self) -> bool:
        return self.target.reached(self.value.median) >= 1


def at_least(limit: float) -> Target:
    return Target(limit, at_least=True)


def at_most(limit: float) -> Target:
    return Target(limit, at_least=False)


def check_finite(what: str, figures: Mapping[str, Any]) -> None:
    """Refuse figures that are NaN or infinite: JSON has no such numbers, and no verdict about them is right.

    Raises:
        Failure: with the name of the first one.
    """
    for name, value in _numbers(figures, ""):
        if not math.isfinite(value):
            raise Failure(f"{what}: {name} is {value}")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested figures, each with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (int, float)):
        yield name, value
