"""The evaluation of a run: on rows that were held out, without dropout."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

from jaxllm.config import TrainConfig
from jaxllm.loss import IGNORED
from jaxllm.metrics import eval_record
from jaxllm.parallel import Programs
from jaxllm.step import TrainState


class Evaluator:
    """Mean cross-entropy over the held-out rows."""

    def __init__(self, config: TrainConfig, programs: Programs, rows: np.ndarray):
        short = -len(rows) % config.batch_size
        padded = np.concatenate([rows, np.full((short, rows.shape[1]), IGNORED, np.int32)])
        self._batches = padded.reshape(-1, config.batch_size, rows.shape[1])
        self._samples = len(rows)
        self._evaluate = programs.evaluate

    def __call__(
        self, state: TrainState, epoch: float, step: int, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The evaluation line; None where a signal interrupts it."""
        jax.block_until_ready(state)  # the clock starts behind the training
        start = time.perf_counter()
        sums: list[tuple[jax.Array, jax.Array]] = []
        for batch in self._batches:
            if interrupted():
                return None
            if len(sums) > 1:
                sums[-2][0].block_until_ready()  # so that what is asked for is at most one batch ahead
            sums.append(self._evaluate(state, batch))
        loss = sum(float(nll) for nll, _ in sums) / sum(int(count) for _, count in sums)
        seconds = time.perf_counter() - start
        return eval_record(loss, seconds, self._samples, len(self._batches), epoch, step)
