"""The ladder of comparisons, from equal weights to equal training; each rung depends on those below.

    weights -> layers (every part of each) -> parts on the same input -> logits -> loss -> padding -> evaluation
        -> gradients -> one step -> a trajectory -> generation -> adapters, not merged

Both frameworks first choose experts freely; where they differ, `replay` tells near ties from faults.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.store.checkpoint import Weights
from parity_tests.adapters import AdapterRung, Adapters
from parity_tests.compare import TOLERANCES, Row, Tolerances
from parity_tests.forward_rungs import ForwardRungs, Subject
from parity_tests.generation import JaxGeneration
from parity_tests.options import MIN_STEPS, RUNGS
from parity_tests.settings import Settings, make_plan
from parity_tests.training_rungs import Curve, TrainingRungs

DEFAULT = Settings()


class Ladder:
    """Compares a Flax model with PyTorch models.

    The Flax side of each rung is computed once, so that many PyTorch models can be compared with it.

    Args:
        config, weights: the Flax model, without dropout, because the frameworks draw different numbers.
        tokens: token ids of a text.
        precision: a key of TOLERANCES.
        interleaved: as in `convert.mapping.entries`.
        adapters: those that are merged in the weights; None: none are compared.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        tokens: np.ndarray,
        precision: str = "float32",
        settings: Settings = DEFAULT,
        interleaved: bool = True,
        adapters: Adapters | None = None,
    ):
        if config.dropout:
            raise ValueError(f"dropout is {config.dropout}: the frameworks draw different numbers, it must be 0")
        if settings.steps < MIN_STEPS:
            raise ValueError(f"steps is {settings.steps}: it must be at least {MIN_STEPS}")
        self.precision = precision
        self.plan = make_plan(config, precision, settings)
        self.tolerances: Tolerances = TOLERANCES[precision]
        # on the host: arrays of a checkpoint are committed to a device, and each mixture with others is compiled anew
        weights = jax.device_get(weights)
        subject = Subject(config, weights, precision, self.tolerances, interleaved)
        self.ids = tokens[None, : min(settings.seq_len, config.max_position_embeddings)]  # (1,T)
        self.forward = ForwardRungs(subject, self.ids)
        # without a run's own choice, gradients are computed with remat and steps without
        self.training = TrainingRungs(subject, self.plan, tokens, None if settings.run else True)
        few = not settings.widens
        self.generation = JaxGeneration(config, weights, tokens, precision, quick=few, greedy=settings.greedy)
        self.adapters = AdapterRung(subject, adapters, self.plan, tokens, self.ids) if adapters else None

    @staticmethod
    def tokens_needed(config: ModelConfig, settings: Settings) -> int:
        """Of a text, not to repeat it."""
        plan = make_plan(config, "float32", settings)
        steps, wide = plan.steps * plan.config.tokens_per_step, 3 * int(np.prod(plan.wide))
        return max(min(settings.seq_len, config.max_position_embeddings), steps, wide)

    @property
    def curve(self) -> Curve:
        return self.training.curve

    @property
    def not_compared(self) -> list[str]:
        """What the rungs that were climbed left out, one line each."""
        of_adapters = self.adapters.training.not_compared if self.adapters else []
        return [*dict.fromkeys(self.training.not_compared + self.generation.not_compared + of_adapters)]

    def climb(self, model: Any, rungs: Iterable[str] = RUNGS) -> Iterator[tuple[str, list[Row]]]:
        """Compare rung by rung, in the order of the ladder; the model is unchanged afterwards.

        Args:
            model: the PyTorch model, in eval mode; its parameters in float64 if that is the precision, else float32.
        """
        forward, training = self.forward, self.training
        evaluation = functools.partial(forward.evaluation, training=training.jax, batches=training.evaluated)
        climbers = {
            "weights": forward.weights, "layers": forward.layers, "parts": forward.parts, "logits": forward.logits,
            "loss": forward.loss, "padding": forward.padding, "evaluation": evaluation,
            "gradients": training.gradients, "step": training.step, "trajectory": training.trajectory,
            "generation": self.generation.compare,
            "adapters": lambda _: [*self.adapters.compare()] if self.adapters else [],
        }  # fmt: skip
        forward.start()
        for rung in RUNGS:
            if rung in rungs:
                yield rung, climbers[rung](model)
