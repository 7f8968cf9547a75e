"""One line of the table: a measurement, what it is compared with, and their ratio."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.finding import Target, check_finite


@dataclass(frozen=True)
class Line:
    what: str
    measured: str
    reference: str = ""
    """What it is compared with: the plan, the data sheet, PyTorch."""
    ratio: float | None = None
    goal: Target | None = None
    judged: float | None = None
    """The number that the goal is about; None: the ratio."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The numbers, for programs."""

    def __post_init__(self) -> None:
        check_finite(self.what, {**self.figures, "ratio": self.ratio, "judged": self.judged})

    @property
    def verdict(self) -> str:
        value = self.ratio if self.judged is None else self.judged
        if self.goal is None or value is None:
            return ""
        reached = self.goal.reached(value)
        return f"{self.goal}: " + ("reached" if reached >= 1 else f"{reached:.2f} of it")

    def as_json(self, quick: bool) -> dict[str, Any]:
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        return {
            "what": self.what, "measured": self.measured, "reference": self.reference, "ratio": ratio,
            "goal": "" if quick else self.verdict, "figures": self.figures,
        }  # fmt: skip


class Found(NamedTuple):
    """What a part found."""

    lines: list[Line]
    not_measured: str
    """The reason in one line; empty: it was measured."""
    seconds: float


def apart(ratio: float) -> float:
    """How far a ratio is from one, in either direction: 1.25 for 0.8."""
    return max(ratio, 1 / ratio)
