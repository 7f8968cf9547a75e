"""What a run remembers of its steps beside its state: the lines it logged, and what the next lines depend on.

It is part of every checkpoint, so that a resumed run writes the lines that an undisturbed one would have written.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from jaxllm.errors import UserError

MEAN_DECAY, VARIANCE_DECAY = 0.9, 0.98
"""Of what a loss is held against: a mean that looks back ten steps, so that it follows a loss that falls, and a
variance that looks back fifty."""

SPIKE_STEPS = 50
"""No loss is called a spike before so many: the first losses of a run fall steeply."""

SPIKE_DEVIATIONS = 6.0
"""So many standard deviations above the mean is a spike."""


@dataclass
class Journal:
    """The log of a run so far. JSON values only."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """Every line of `metrics.jsonl`."""
    losses: list[float] = field(default_factory=list)
    """Of the steps behind the last training line."""
    loss_sum: float = 0.0
    """Of all steps whose loss is finite."""
    finite_steps: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    """Up to the last step."""
    usual_loss: float = 0.0
    """Running mean of the loss."""
    loss_variance: float = 0.0
    """Running variance of the loss."""

    def add_step(self, loss: float, grad_norm: float) -> str | None:
        """Take note of one step; returns `nonfinite` or `spike` where it was no usual one."""
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

    def take_mean_loss(self) -> float:
        """Mean of the steps since this was last asked; not a number where no loss of them was finite."""
        mean = sum(self.losses) / len(self.losses) if self.losses else math.nan
        self.losses = []
        return mean

    def mean_loss(self) -> float:
        """Mean of all steps whose loss was finite."""
        return self.loss_sum / self.finite_steps if self.finite_steps else math.nan

    def evaluations(self) -> dict[int, float]:
        """Evaluation losses by step; those that are not finite left out."""
        losses = {record["step"]: record["eval_loss"] for record in self.records if "eval_loss" in record}
        return {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"records": list(self.records), "losses": list(self.losses)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Journal:
        """The inverse of `to_json`.

        Raises:
            UserError: it is something else.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not all(_fits(name, values.get(name)) for name in names):
            raise UserError("the journal of the checkpoint is of another kind: delete that checkpoint to use another")
        return cls(**{name: values[name] for name in names})


def _fits(name: str, value: Any) -> bool:
    if name == "records":
        return isinstance(value, list) and all(_is_record(record) for record in value)
    if name == "losses":
        return isinstance(value, list) and all(map(_is_number, value))
    if isinstance(getattr(Journal, name), int):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return _is_number(value)


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    return record.get("eval_loss") is None or _is_number(record["eval_loss"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
