"""Reads the loss of each step one step after the device computed it, so that reading costs no time."""

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxllm.data.stream import Position
from jaxllm.errors import UserError
from jaxllm.run.metrics import RunLog, nonfinite_record, spike_record
from jaxllm.run.processes import all_gather
from jaxllm.store.history import History
from jaxllm.train.step import StepMetrics


class NotFiniteError(UserError):
    """Too many steps in a row were not finite."""


class _PendingStep(NamedTuple):
    number: int
    metrics: StepMetrics
    position: Mapping[int, Position]  # before its batch


class StepMonitor:
    """Enters steps into the history and the log, and ends a run whose steps are not finite.

    Args:
        history, log: of the run.
        max_nonfinite: end the run after this many steps in a row.
    """

    def __init__(self, history: History, log: RunLog, max_nonfinite: int):
        self._history, self._log, self._max_nonfinite = history, log, max_nonfinite
        self._pending: deque[_PendingStep] = deque()

    def add(self, step: int, metrics: StepMetrics, position: Mapping[int, Position]) -> None:
        """A step that was handed to the device; `position` is where its batch began."""
        self._pending.append(_PendingStep(step, metrics, position))

    def flush(self, max_pending: int) -> None:
        """Wait for all steps but the last `max_pending`, and enter them.

        Raises:
            NotFiniteError: `max_nonfinite` steps in a row were not finite.
        """
        while len(self._pending) > max_pending:
            step = self._pending.popleft()
            loss, grad_norm = float(step.metrics.loss), float(step.metrics.grad_norm)
            usual = self._history.usual_loss
            found = self._history.add_step(loss, grad_norm)
            if found == "spike":
                self._log.write(spike_record(loss, usual, step.number))
            elif found == "nonfinite":
                position = all_gather({str(s): _summary(position) for s, position in step.position.items()})
                self._log.write(nonfinite_record(loss, grad_norm, step.number, position))
                self._check(step.number, loss)

    def _check(self, step: int, loss: float) -> None:
        in_a_row = self._history.nonfinite_in_a_row
        if in_a_row >= self._max_nonfinite:
            raise NotFiniteError(
                f"{in_a_row} steps in a row, up to step {step}, were not finite (loss {loss}) and changed nothing; the "
                f"checkpoints are unchanged: `python -m jaxllm.run.replay RUN {step - in_a_row + 1}` shows where it "
                "begins, --max-nonfinite allows more"
            )


def _summary(position: Position) -> dict[str, Any]:
    """Where a stream was, without the rows of its pool: a checkpoint has those."""
    return {"source": position.source, "drawn": position.drawn}
