"""Looks at the loss of each step one step behind the device, so that looking costs no time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxllm.config import TrainConfig
from jaxllm.data.stream import Position
from jaxllm.errors import UserError
from jaxllm.journal import Journal
from jaxllm.metrics import NoLog, RunLog, nonfinite_record, spike_record
from jaxllm.processes import gathered
from jaxllm.step import StepMetrics


class NotFiniteError(UserError):
    """Too many steps in a row were not finite."""


class _Step(NamedTuple):
    number: int
    metrics: StepMetrics
    position: Mapping[int, Position]  # before its batch


class Watch:
    """Enters steps into the journal and the log, and ends a run that has lost its way."""

    def __init__(self, config: TrainConfig, journal: Journal, log: RunLog | NoLog):
        self._config, self._journal, self._log = config, journal, log
        self._waiting: deque[_Step] = deque()

    def add(self, step: int, metrics: StepMetrics, position: Mapping[int, Position]) -> None:
        """A step that has been handed to the device; `position` is where its batch began."""
        self._waiting.append(_Step(step, metrics, position))

    def settle(self, behind: int) -> None:
        """Wait for all steps but the last `behind`, and enter them.

        Raises:
            NotFiniteError: `max_nonfinite` steps in a row were not finite.
        """
        while len(self._waiting) > behind:
            step = self._waiting.popleft()
            loss, grad_norm = float(step.metrics.loss), float(step.metrics.grad_norm)
            usual = self._journal.usual_loss
            found = self._journal.add_step(loss, grad_norm)
            if found == "spike":
                self._log.write(spike_record(loss, usual, step.number))
            elif found == "nonfinite":
                position = gathered({str(s): _small(position) for s, position in step.position.items()})
                self._log.write(nonfinite_record(loss, grad_norm, step.number, position))
                self._check(step.number, loss)

    def _check(self, step: int, loss: float) -> None:
        in_a_row = self._journal.nonfinite_in_a_row
        if in_a_row >= self._config.max_nonfinite:
            raise NotFiniteError(
                f"{in_a_row} steps in a row, up to step {step}, were not finite (loss {loss}) and changed nothing; the "
                f"checkpoints are as they were: --replay {step - in_a_row + 1} shows where it begins, "
                "--max-nonfinite allows more"
            )


def _small(position: Position) -> dict[str, Any]:
    """Where a stream stood, without the rows that wait in its pool: a checkpoint has those."""
    return {"source": position.source, "drawn": position.drawn}
