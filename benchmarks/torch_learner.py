"""The PyTorch side of the learning curves: transformers' DeepSeek-V3 of the same size, with torch.optim's AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.sizes import family_model, learner_config, learner_labels
from benchmarks.worker import Contender
from jaxllm.config import TrainConfig
from jaxllm.model.flops import active_parameters
from jaxllm.run.checkpoint import Weights
from jaxllm.train.state import init_state
from parity_tests.hf_side import stock_model
from torch_ref.step import StepMetrics, make_optimizer, make_schedule, tokens_per_expert, train_step

EXPERTS = ("eager", "grouped_mm")
"""transformers' implementations of the experts."""


class StockLearner:
    """`DeepseekV3ForCausalLM` from new weights, trained by `torch_ref.step`, which moves the routing bias too."""

    def __init__(self, config: TrainConfig, experts: str):
        config = config.with_options(model=family_model(config.model))
        state = init_state(config)
        self._config, self._model = config, stock_model(config.model, Weights(state.params, state.routing_bias)).train()
        self._model.set_experts_implementation(experts)
        self._optimizer = make_optimizer(self._model, config, fused=True)
        self._schedule = make_schedule(self._optimizer, config)
        total = sum(p.numel() for p in self._model.parameters())
        self.facts = {"parameters": total, "active_parameters": sum(active_parameters(config.model).values())}

    def step(self, rows: np.ndarray) -> StepMetrics:
        """One optimizer step on rows (B,T)."""
        labels = torch.from_numpy(rows)[None].long()
        return train_step(self._model, self._optimizer, self._schedule, self._config, labels)

    def expert_load(self, rows: np.ndarray) -> float:
        """Tokens of the fullest expert over the mean, in the worst layer, in a step on rows (B,T)."""
        chosen = self.step(rows).experts.swapaxes(0, 1)
        tokens = tokens_per_expert(list(chosen), self._config.model.n_routed_experts).double()
        return float((tokens.max(dim=-1).values / tokens.mean(dim=-1)).max())

    @torch.no_grad()
    def loss(self, rows: np.ndarray) -> float:
        """Mean cross-entropy of rows (n,T), in nats per token; n is a multiple of the batch size."""
        batches = torch.from_numpy(rows).long().split(self._config.data.batch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._config.precision == "bfloat16"):
            return float(np.mean([float(self._model(batch, labels=batch).loss) for batch in batches]))


def learner_steps(quick: bool) -> tuple[dict[str, Contender], dict[str, Any]]:
    """The step of the small model in both precisions, each with both implementations of the experts."""
    labels = learner_labels(quick)

    def contender(learner: StockLearner) -> Contender:
        return lambda: {"loss": float(learner.step(labels).loss)}

    config = learner_config("adamw", quick)
    learners = {
        f"{precision} {experts}": StockLearner(config.with_options(precision=precision), experts)
        for precision in ("float32", "bfloat16")
        for experts in EXPERTS
    }
    facts = next(iter(learners.values())).facts
    return {name: contender(learner) for name, learner in learners.items()}, facts
