"""The ladder of comparisons, from equal weights to equal training; each rung depends on those below.

    weights -> layers (every part of each) -> logits -> loss -> gradients -> one step -> a trajectory -> generation

Both frameworks first choose experts freely. If they differ, rounding may have decided a near tie in a router. The Flax
side then runs again with the experts that PyTorch chose. This replay must agree in everything, and each choice that
Flax would have made differently must be a near tie.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.config.families import names_of
from jaxllm.run.checkpoint import Weights
from jaxllm.train.loss import IGNORED
from parity_tests.compare import (
    DEEPSEEK_BFLOAT16,
    MUON_BFLOAT16,
    TOLERANCES,
    Flips,
    Row,
    Tolerance,
    Tolerances,
    compare_arrays,
    compare_bits,
    compare_leaves,
    compare_numbers,
    expert_flips,
    total_flips,
)
from parity_tests.forward import ROUTER_PARTS, Trace, jax_trace, state_dict_arrays, torch_named, torch_trace
from parity_tests.generation import JaxGeneration
from parity_tests.options import MIN_STEPS, RUNGS
from parity_tests.training import JaxTraining, Named, Trained, random_moments, torch_gradients, torch_train
from torch_ref import CustomLLM as TorchCustomLLM

ACCUMULATED, ROWS, ROW_TOKENS = 2, 2, 64
"""Batches of the training rungs: micro-batches in a step, rows in a micro-batch, tokens in a row."""


def training_config(model: ModelConfig, steps: int, precision: str, optimizer: str = "adamw") -> TrainConfig:
    """All features of training within a few steps: warm-up, cosine, clipping, decay, accumulation."""
    return TrainConfig.from_options(
        model=model,
        seq_len=min(ROW_TOKENS, model.max_position_embeddings),
        batch_size=ROWS,
        grad_accum=ACCUMULATED,
        steps=steps,
        warmup_steps=max(1, steps // 5),
        optimizer=optimizer,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        precision="bfloat16" if precision == "bfloat16" else "float32",
    )


def training_batches(config: TrainConfig, tokens: np.ndarray) -> np.ndarray:
    """(steps, A, B, T) labels; the micro-batches of a step have different numbers of targets."""
    shape = (config.schedule.steps, config.data.grad_accum, config.data.batch_size, config.data.seq_len)
    labels = tokens[: np.prod(shape)].reshape(shape).copy()
    labels[:, 0, 0, config.data.seq_len // 2 :] = IGNORED
    return labels


@dataclass
class Curve:
    """The losses of a trajectory."""

    jax: list[float] = field(default_factory=list)
    torch: list[float] = field(default_factory=list)
    first_difference: int | None = None
    """The first step, counted from 1, whose losses differ by more than the tolerance."""
    replayed: bool = False
    """Whether the Flax side used PyTorch's choice of experts."""


ROUNDINGS = 10
"""50 steps in another order of summation change as much as weights that differ by about as many units of roundoff."""
AMPLIFIED = 3.0
"""Two runs may differ by this many times what that change does."""
MAX_AMPLIFIED = 3e-2
"""Runs that would have to differ by more cannot be compared."""


class Amplification(NamedTuple):
    """How much two trainings may differ."""

    parameters: Tolerance
    losses: np.ndarray  # (steps,), relative
    note: str

    @classmethod
    def none(cls, tolerance: Tolerance, steps: int) -> Amplification:
        return cls(tolerance, np.full(steps, tolerance.relative_l2), "")


def _rounded(weights: Weights, precision: str) -> Weights:
    """The weights with a relative change of `ROUNDINGS` units of roundoff in a random direction."""
    rng = np.random.default_rng(0)
    roundoff = np.finfo(precision).eps / 2

    def change(leaf) -> np.ndarray:
        leaf = np.asarray(leaf, precision)
        return (leaf * (1 + ROUNDINGS * roundoff * rng.choice([-1, 1], leaf.shape))).astype(precision)

    return weights._replace(params=jax.tree.map(change, weights.params))


def _curve(ours: Trained, theirs: Trained, replayed: bool, limits: np.ndarray) -> Curve:
    pairs = zip(ours.losses, theirs.losses, limits, strict=True)
    apart = (step for step, (a, b, limit) in enumerate(pairs, 1) if not abs(a - b) <= limit * abs(a))
    return Curve(ours.losses, theirs.losses, next(apart, None), replayed)


class Ladder:
    """Compares a Flax model with PyTorch models.

    The Flax side of each rung is computed once, so that many PyTorch models can be compared with it.

    Args:
        config, weights: the Flax model, without dropout, because the frameworks draw different numbers.
        tokens: token ids of a text, at least `tokens_needed`.
        precision: a key of TOLERANCES.
        seq_len: tokens of the forward rungs.
        steps: of the trajectory.
        optimizer: of the training rungs.
        interleaved: as in `convert.mapping.entries`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        tokens: np.ndarray,
        precision: str = "float32",
        seq_len: int = 500,
        steps: int = 50,
        optimizer: str = "adamw",
        interleaved: bool = True,
    ):
        if config.dropout:
            raise ValueError(f"dropout is {config.dropout}: the frameworks draw different numbers, it must be 0")
        if steps < MIN_STEPS:
            raise ValueError(f"steps is {steps}: it must be at least {MIN_STEPS}")
        self.config, self.weights, self.precision, self.interleaved = config, weights, precision, interleaved
        deepseek = names_of(config) == "deepseek" and precision == "bfloat16"
        self.tolerances: Tolerances = DEEPSEEK_BFLOAT16 if deepseek else TOLERANCES[precision]
        if optimizer == "muon" and precision == "bfloat16":
            self.tolerances = self.tolerances._replace(update=MUON_BFLOAT16)
        self.ids = tokens[None, : min(seq_len, config.max_position_embeddings)]  # (1,T)
        self.training = training_config(config, steps, precision, optimizer)
        self.batches = training_batches(self.training, tokens)
        self.curve = Curve()

    @staticmethod
    def tokens_needed(config: ModelConfig, seq_len: int, steps: int) -> int:
        training = training_config(config, steps, "float32")
        return max(min(seq_len, config.max_position_embeddings), training.schedule.steps * training.tokens_per_step)

    def climb(self, model: TorchCustomLLM, rungs: Iterable[str] = RUNGS) -> Iterator[tuple[str, list[Row]]]:
        """Compare rung by rung, in the order of the ladder; the model is unchanged afterwards.

        Args:
            model: the PyTorch model, in eval mode; its parameters in float64 if that is the precision, else float32.
        """
        climbers: dict[str, Callable[[TorchCustomLLM], list[Row]]] = {
            "weights": self._weights, "layers": self._layers, "logits": self._logits, "loss": self._loss,
            "gradients": self._gradients, "step": self._step, "trajectory": self._trajectory,
            "generation": self._generation,
        }  # fmt: skip
        self._traces: tuple[Trace, Trace] | None = None
        for rung in RUNGS:
            if rung in rungs:
                yield rung, climbers[rung](model)

    def _weights(self, model: TorchCustomLLM) -> list[Row]:
        ours = torch_named(self.config, *self.weights, interleaved=self.interleaved)
        theirs = {name: values.astype(ours[name].dtype) if name in ours else values
                  for name, values in state_dict_arrays(model).items()}  # fmt: skip
        return compare_bits("weights", "weights", ours, theirs)

    # forward

    @functools.cached_property
    def _jax_trace(self) -> Trace:
        return jax_trace(self.config, self.weights, self.ids, self.precision)

    @functools.cached_property
    def _routing_bias(self) -> np.ndarray:  # (L,E)
        return routing_bias_of(self.config, self.weights)

    def _forward(self, model: TorchCustomLLM) -> tuple[Trace, Trace]:
        """Both forward passes with the same experts, computed once per climb."""
        if self._traces is None:
            ours, theirs = self._jax_trace, torch_trace(model, self.ids, self.precision)
            if not _same_choice(ours.experts, theirs.experts):
                ours = jax_trace(self.config, self.weights, self.ids, self.precision, theirs.experts)
            self._traces = ours, theirs
        return self._traces

    def _layers(self, model: TorchCustomLLM) -> list[Row]:
        ours, theirs = self._forward(model)
        tolerance = self.tolerances.forward
        rows = [compare_arrays("layers", "embeddings", "", ours.embeddings, theirs.embeddings, tolerance)]
        for i in range(self.config.num_hidden_layers):
            leaf, routed = f"layer {i}", i - self.config.dense_layers
            for part, values in theirs.parts.items():
                index = routed if part in ROUTER_PARTS else i
                if index < 0:
                    continue
                rows.append(compare_arrays("layers", part, leaf, ours.parts[part][index], values[index], tolerance))
                if part in ("router scores", "router logits"):
                    scores, bias = ours.parts["router scores"][index], self._routing_bias[index]
                    flips = expert_flips(scores, bias, theirs.experts[index], self.config.router)
                    rows.append(self._choice_row("layers", leaf, flips, self.ids.size))
        return rows

    def _choice_row(self, rung: str, leaf: str, flips: Flips, tokens: int, near_tie: float | None = None) -> Row:
        note = f"{tokens - flips.count} of {tokens} tokens choose the same experts"
        if flips.count:
            note += f"; replayed: {flips.count} near ties, the widest margin is {flips.margin:.1e}"
        if flips.groups:
            note += f"; {flips.groups} of them between groups"
        near_tie = self.tolerances.near_tie if near_tie is None else near_tie
        passed, name = flips.margin <= near_tie, f"near tie {near_tie:.1g}"
        return Row(rung, "expert choice", leaf, passed, name, max_error=flips.margin, note=note)

    def _logits(self, model: TorchCustomLLM) -> list[Row]:
        ours, theirs = self._forward(model)
        return [compare_arrays("logits", "logits", "", ours.logits, theirs.logits, self.tolerances.forward)]

    def _loss(self, model: TorchCustomLLM) -> list[Row]:
        ours, theirs = self._forward(model)
        return [compare_numbers("loss", "loss", ours.loss, theirs.loss, self.tolerances.forward)]

    # training

    @functools.cached_property
    def _jax(self) -> JaxTraining:
        return JaxTraining(self.training, self.weights, self.precision, self.interleaved)

    @functools.cached_property
    def _jax_gradients(self):
        return self._jax.gradients(self.batches[0])

    def _gradients(self, model: TorchCustomLLM) -> list[Row]:
        theirs = torch_gradients(model, self.training, self.batches[0])

        def compare(ours) -> list[Row]:
            return [
                compare_numbers("gradients", "training loss", ours.loss, theirs.loss, self.tolerances.forward),
                *compare_leaves("gradients", "gradients", ours.grads, theirs.grads, self.tolerances.gradient),
            ]

        return self._free_or_replayed(
            "gradients",
            lambda: compare(self._jax_gradients),
            lambda: self._flips(self.weights, 0, theirs.experts),
            lambda: compare(self._jax.gradients(self.batches[0], theirs.experts)),
        )

    @functools.cached_property
    def _moments(self):
        # after the warm-up: the first update has the rate 0, and zero moments would hide the scale of the gradient
        return random_moments(self.training, self.weights, count=self.training.schedule.warmup_steps + 1)

    @functools.cached_property
    def _jax_step(self) -> Trained:
        return self._jax.train(self.batches[:1], self._moments)

    def _step(self, model: TorchCustomLLM) -> list[Row]:
        theirs = torch_train(model, self.training, self.batches[:1], self._moments)
        before = torch_named(self.config, self.weights.params, interleaved=self.interleaved)
        tolerance = self.tolerances.update

        def compare(ours: Trained) -> list[Row]:
            return [
                compare_numbers(
                    "step", "gradient norm", ours.grad_norms[0], theirs.grad_norms[0], self.tolerances.gradient
                ),
                *compare_leaves("step", "first moments", ours.mu, theirs.mu, tolerance),
                *compare_leaves("step", "second moments", ours.nu, theirs.nu, tolerance),
                *compare_leaves("step", "update", _change(before, ours), _change(before, theirs), tolerance),
                *self._bias_rows("step", ours, theirs),
            ]

        return self._free_or_replayed(
            "step",
            lambda: compare(self._jax_step),
            lambda: self._flips(self.weights, 0, theirs.experts[0]),
            lambda: compare(self._jax.train(self.batches[:1], self._moments, theirs.experts)),
        )

    @functools.cached_property
    def _jax_trajectory(self) -> Trained:
        return self._jax.train(self.batches)

    def _trajectory(self, model: TorchCustomLLM) -> list[Row]:
        theirs = torch_train(model, self.training, self.batches)
        rows = self._trajectory_rows(theirs, Amplification.none(self.tolerances.trajectory, len(theirs.losses)))
        if self.precision == "bfloat16" or all(row.passed for row in rows):
            return rows
        amplified = self._amplification(theirs.experts)
        return rows if amplified is None else self._trajectory_rows(theirs, amplified)

    def _trajectory_rows(self, theirs: Trained, allowed: Amplification) -> list[Row]:
        def compare(ours: Trained, replayed: bool) -> list[Row]:
            self.curve = _curve(ours, theirs, replayed, allowed.losses)
            apart = self.curve.first_difference
            tolerance = allowed.parameters._replace(relative_l2=float(allowed.losses.max()))
            losses = compare_arrays(
                "trajectory", "losses", "", np.asarray(ours.losses), np.asarray(theirs.losses), tolerance
            )
            note = "; ".join(filter(None, [apart and f"first at step {apart}", allowed.note]))
            losses = dataclasses.replace(losses, passed=losses.passed and apart is None, note=note)
            return [
                losses,
                *compare_leaves("trajectory", "parameters", ours.params, theirs.params, allowed.parameters),
                *self._bias_rows("trajectory", ours, theirs),
            ]

        @functools.cache
        def replay() -> tuple[Trained, Flips]:
            found: list[Flips] = []

            def record_flips(step: int, weights: Weights) -> None:
                found.append(self._flips(weights, step, theirs.experts[step]))

            return self._jax.train(self.batches, None, theirs.experts, record_flips), total_flips(found)

        return self._free_or_replayed(
            "trajectory",
            lambda: compare(self._jax_trajectory, replayed=False),
            lambda: replay()[1],
            lambda: compare(replay()[0], replayed=True),
            # the scores may differ as much as the weights
            near_tie=max(self.tolerances.near_tie, allowed.parameters.relative_l2),
        )

    def _amplification(self, experts: list[np.ndarray]) -> Amplification | None:
        """How far this training amplifies rounding; None if by no more than the tolerance says.

        High rates make training chaotic: two correct programs then part. The Flax model is trained twice with the same
        experts, the second time from weights with a relative change of a few units of roundoff.
        """
        tolerance = self.tolerances.trajectory
        changed = _rounded(self.weights, self.precision)
        runs = [self._jax.train(self.batches, None, experts, weights=weights) for weights in (self.weights, changed)]
        parameters = compare_leaves("", "", runs[0].params, runs[1].params, tolerance)
        largest = AMPLIFIED * max(row.relative_l2 or 0.0 for row in parameters)
        if not tolerance.relative_l2 < largest:
            return None
        allowed = min(largest, MAX_AMPLIFIED)
        losses = np.asarray([run.losses for run in runs])
        apart = AMPLIFIED * np.maximum.accumulate(np.abs(losses[0] - losses[1]) / np.abs(losses[0]))
        return Amplification(
            tolerance._replace(name=f"{allowed:.0e}, amplified", relative_l2=allowed),
            np.clip(apart, tolerance.relative_l2, allowed),
            f"a change of the weights by {ROUNDINGS} roundings changes the parameters by {largest / AMPLIFIED:.0e}",
        )

    def _bias_rows(self, rung: str, ours: Trained, theirs: Trained) -> list[Row]:
        """The routing bias is a sum of signs: if the choices are the same, only its rounding differs."""
        return compare_leaves(rung, "routing bias", ours.routing_bias, theirs.routing_bias, self._bias_tolerance)

    @property
    def _bias_tolerance(self) -> Tolerance:
        master = "float64" if self.precision == "float64" else "float32"
        return TOLERANCES[master].forward._replace(name="routing bias", max_over_std=math.inf)

    def _free_or_replayed(
        self,
        rung: str,
        free: Callable[[], list[Row]],
        flips: Callable[[], Flips],
        replay: Callable[[], list[Row]],
        near_tie: float | None = None,
    ) -> list[Row]:
        """The rows of the free run if they pass; else those of the replay, if all different choices are near ties.

        In bfloat16 rounding flips a choice in nearly every batch, so only the replay is meaningful.
        """
        if self.precision != "bfloat16":
            rows = free()
            if all(row.passed for row in rows):
                return rows
        total = flips()
        labels = self.batches if rung == "trajectory" else self.batches[:1]
        choice = self._choice_row(rung, "", total, labels.size * self.config.moe_layers, near_tie)
        if self.precision == "bfloat16" or (total.count and choice.passed):
            return [choice, *replay()]
        return [*rows, choice]  # not a near tie: report the differences of the free run

    def _flips(self, weights: Weights, step: int, experts: np.ndarray) -> Flips:
        """The choices that Flax would make differently from the given experts (A,L,B,T,k) of a step."""
        found = []
        for labels, forced in zip(self.batches[step], experts, strict=True):
            trace = jax_trace(self.config, weights, np.maximum(labels, 0), self.precision, forced)
            if self.config.moe_layers:
                bias = routing_bias_of(self.config, weights)[:, None, None]
                found.append(expert_flips(trace.parts["router scores"], bias, forced, self.config.router))
        return total_flips(found or [Flips(0, 0, 0.0)])

    @functools.cached_property
    def _jax_generation(self) -> JaxGeneration:
        return JaxGeneration(self.config, self.weights, self.ids[0], self.precision)

    def _generation(self, model: TorchCustomLLM) -> list[Row]:
        return self._jax_generation.compare(model)


def routing_bias_of(config: ModelConfig, weights: Weights) -> np.ndarray:
    """The routing bias of all layers that have experts, (L,E); zero where none steers the choice."""
    for bias in jax.tree.leaves(weights.routing_bias):
        return np.asarray(bias)
    return np.zeros((config.moe_layers, config.n_routed_experts))


def _same_choice(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool((np.sort(ours, axis=-1) == np.sort(theirs, axis=-1)).all())


def _change(before: Named, after: Trained) -> Named:
    """The update of the parameters, in float64; a difference in it would be too small to see in the parameters."""
    return {name: values.astype(np.float64) - before[name] for name, values in after.params.items()}
