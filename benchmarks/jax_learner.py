"""The JAX side of the learning curves: a small model that trains on batches, and is evaluated on rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.sizes import learner_config, learner_labels
from benchmarks.worker import Contender
from jaxllm.config import TrainConfig
from jaxllm.model.decoder import count_parameters
from jaxllm.model.flops import active_parameters
from jaxllm.train.step import StepMetrics
from jaxllm.train.trainer import Trainer

OPTIMIZERS = ("adamw", "muon")


class JaxLearner:
    """What `train.py` trains."""

    def __init__(self, config: TrainConfig):
        self._trainer = Trainer(config)
        self._state = self._trainer.init()
        self._rows = config.data.batch_size
        active = sum(active_parameters(config.model).values())
        self.facts = {"parameters": count_parameters(self._state.params), "active_parameters": active}

    def step(self, rows: np.ndarray) -> StepMetrics:
        """One optimizer step on rows (B,T)."""
        self._state, metrics = jax.block_until_ready(self._trainer.step(self._state, rows))
        return metrics

    def expert_load(self, rows: np.ndarray) -> float:
        """Tokens of the fullest expert over the mean, in the worst layer, in a step on rows (B,T)."""
        return float(self.step(rows).expert_load)

    def loss(self, rows: np.ndarray) -> float:
        """Mean cross-entropy of rows (n,T), in nats per token; n is a multiple of the batch size."""
        sums = [self._trainer.evaluate(self._state, batch) for batch in rows.reshape(-1, self._rows, rows.shape[-1])]
        return sum(float(nll) for nll, _ in sums) / sum(int(count) for _, count in sums)


def learner_steps(quick: bool) -> tuple[dict[str, Contender], dict[str, Any]]:
    """The step of the small model, with each optimizer in both precisions."""
    labels = learner_labels(quick)

    def contender(learner: JaxLearner) -> Contender:
        return lambda: {"loss": float(learner.step(labels).loss)}

    learners = {
        f"{optimizer} {precision}": JaxLearner(learner_config(optimizer, quick).with_options(precision=precision))
        for optimizer in OPTIMIZERS
        for precision in ("float32", "bfloat16")
    }
    facts = next(iter(learners.values())).facts
    return {name: contender(learner) for name, learner in learners.items()}, facts
