"""The evaluation of a run: on rows that were held out, without dropout."""

import time
from collections.abc import Callable

import jax
import numpy as np

from jaxllm.config import TrainConfig
from jaxllm.model.batch import IGNORED
from jaxllm.run.metrics import eval_record
from jaxllm.run.prepare import Prepared
from jaxllm.train.state import TrainState
from jaxllm.train.trainer import Trainer


class Evaluator:
    """Mean cross-entropy over the targets of the held-out rows."""

    def __init__(self, trainer: Trainer, prepared: Prepared[TrainConfig]):
        rows = prepared.held_out
        batch_size = trainer.config.data.batch_size
        padding = np.full((-len(rows) % batch_size, rows.shape[1]), IGNORED, np.int32)
        self._batches = np.concatenate([rows, padding]).reshape(-1, batch_size, rows.shape[1])
        self._samples, self._bytes_per_target = len(rows), prepared.bytes_per_target
        self._targets = prepared.eval_targets
        self._trainer = trainer

    def __call__(
        self, state: TrainState, epoch: float, step: int, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The evaluation line; None if `interrupted` became true."""
        jax.block_until_ready(state)  # the clock starts after the training
        start = time.perf_counter()
        sums: list[tuple[jax.Array, jax.Array]] = []
        for batch in self._batches:
            if interrupted():
                return None
            if len(sums) > 1:
                sums[-2][0].block_until_ready()  # so that at most one batch is computed in advance
            sums.append(self._trainer.evaluate(state, batch))
        targets = sum(int(count) for _, count in sums)
        loss = sum(float(nll) for nll, _ in sums) / targets
        seconds = time.perf_counter() - start
        return eval_record(
            loss, self._bytes_per_target, seconds=seconds, samples=self._samples, batches=len(self._batches),
            epoch=epoch, step=step, targets=self._targets,
        )  # fmt: skip
