"""The history of a run: the lines it logged, its evaluations, and what the next lines depend on.

It is part of every checkpoint, so that a resumed run writes the lines that an uninterrupted one would have written.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from jaxllm.errors import UserError

MEAN_DECAY, VARIANCE_DECAY = 0.9, 0.98
"""Decay of the running mean and variance that a loss is compared with: the mean averages about ten steps, so that it
follows a falling loss, and the variance about fifty."""

SPIKE_STEPS = 50
"""Steps before a loss can be called a spike: the first losses of a run fall steeply."""

SPIKE_DEVIATIONS = 6.0
"""Standard deviations above the mean that make a spike."""


@dataclass
class History:
    """The log of a run so far. JSON values only."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """Every line of `metrics.jsonl`."""
    evaluations: dict[str, float] = field(default_factory=dict)
    """Evaluation loss by step (a decimal number, as JSON has no other keys)."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps after the last training line."""
    loss_sum: float = 0.0
    """Over all steps whose loss is finite."""
    finite_steps: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    """Up to the last step."""
    usual_loss: float = 0.0
    """Running mean of the loss."""
    loss_variance: float = 0.0
    """Running variance of the loss."""

    def add_record(self, record: dict[str, Any]) -> None:
        """Add a logged line; an evaluation is also entered under its step."""
        self.records.append(record)
        if "eval_loss" in record:
            self.evaluations[str(record["step"])] = record["eval_loss"]

    def add_step(self, loss: float, grad_norm: float) -> str | None:
        """Add one step; returns `nonfinite` or `spike` if it was not a usual one."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.nonfinite_steps += 1
            self.nonfinite_in_a_row += 1
            return "nonfinite"
        self.nonfinite_in_a_row = 0
        self.losses.append(loss)
        self.loss_sum += loss
        self.finite_steps += 1
        if self.finite_steps == 1:
            self.usual_loss = loss
        above = loss - self.usual_loss
        spike = self.finite_steps > SPIKE_STEPS and above > SPIKE_DEVIATIONS * math.sqrt(self.loss_variance)
        self.usual_loss += (1 - MEAN_DECAY) * above
        self.loss_variance = VARIANCE_DECAY * self.loss_variance + (1 - VARIANCE_DECAY) * above**2
        return "spike" if spike else None

    def pop_mean_loss(self) -> float:
        """Mean loss of the steps since the last call; NaN if none of them was finite."""
        mean = sum(self.losses) / len(self.losses) if self.losses else math.nan
        self.losses = []
        return mean

    def mean_loss(self) -> float:
        """Mean over all steps whose loss was finite."""
        return self.loss_sum / self.finite_steps if self.finite_steps else math.nan

    def last_evaluation(self) -> float:
        """The newest evaluation loss; NaN before the first."""
        return self.evaluations[max(self.evaluations, key=int)] if self.evaluations else math.nan

    def to_json(self) -> dict[str, Any]:
        copies = {"records": list(self.records), "losses": list(self.losses), "evaluations": dict(self.evaluations)}
        return vars(self) | copies

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> History:
        """The inverse of `to_json`. Raises a UserError if it is something else."""
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not all(_fits(name, values.get(name)) for name in names):
            raise UserError("the checkpoint's history has another form: move that checkpoint elsewhere to use another")
        return cls(**{name: values[name] for name in names})

    @classmethod
    def from_records(cls, records: list[dict[str, Any]]) -> History:
        """The history of a run that kept only its log, as PyTorch's runs do."""
        history = cls()
        for record in records:
            history.add_record(record)
        return history


def _fits(name: str, value: Any) -> bool:
    if name == "records":
        return isinstance(value, list) and all(isinstance(r, dict) and isinstance(r.get("step"), int) for r in value)
    if name == "evaluations":
        return isinstance(value, dict) and all(k.isdecimal() and _is_number(loss) for k, loss in value.items())
    if name == "losses":
        return isinstance(value, list) and all(map(_is_number, value))
    if isinstance(getattr(History, name), int):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
