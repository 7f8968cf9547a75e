"""The rungs of training: gradients, one step, a trajectory. Where near ties differ, each compares the replay."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from jaxllm.config import TrainConfig
from jaxllm.errors import listed
from jaxllm.model.batch import IGNORED
from jaxllm.store.checkpoint import Weights
from jaxllm.train.optim import StepNumbers, learning_rate
from parity_tests.compare import MUON_BFLOAT16, TOLERANCES, Row, Tolerance, compare_arrays, compare_leaves
from parity_tests.engine.judge import ZERO
from parity_tests.engine.rows import compare_numbers
from parity_tests.forward import jax_precision, torch_named
from parity_tests.forward_rungs import Subject
from parity_tests.options import MIN_STEPS
from parity_tests.replay import Comparison, Flips, total_flips
from parity_tests.rounding import STORED, Update, as_stored, of_iteration, still_float32
from parity_tests.settings import Plan, documents_of, text_batches
from parity_tests.training import (
    Gradients,
    JaxTraining,
    Named,
    Trained,
    one_expert_for_all,
    random_moments,
    torch_gradients,
    torch_train,
)
from torch_ref.step import make_schedule


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
RESOLVED_RATE = 1e-2
"""A learning rate whose update float32 parameters resolve to a ten-thousandth."""
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


class TrainingRungs:
    """Compares gradients, steps and trajectories as `plan` says. The Flax side is computed once.

    Args:
        tokens: of a text; it is repeated where more are needed.
        recomputes: as in `JaxTraining`.
    """

    def __init__(self, subject: Subject, plan: Plan, tokens: np.ndarray, recomputes: bool | None = None):
        self.subject, self.plan, self.recomputes = subject, plan, recomputes
        data = plan.config.data
        self.batches = text_batches(tokens, plan.sizes, plan.steps, data)  # (steps,A,B,T)
        wide = text_batches(tokens, plan.wide, 3, data)
        self.wide_batch = wide[1]  # (A,B,T)
        self.evaluated = wide[[1, 2, 0], 0]  # (3,B,T)
        self.curve = Curve()
        self.not_compared: list[str] = []
        self._dead: set[str] = set()
        self._trained: dict[tuple[int, int, bool], Trained] = {}

    @functools.cached_property
    def jax(self) -> JaxTraining:
        subject = self.subject
        return JaxTraining(
            self.plan.config, subject.weights, subject.precision, subject.interleaved, self.recomputes, subject.base
        )

    @functools.cached_property
    def norms(self) -> tuple[float, float]:
        """Of the gradients of the first two batches."""
        if self.plan.norms is not None:
            return self.plan.norms
        one = self.jax.train(self.batches[:1]).grad_norms[0]
        other = self._free_gradients.norm if self._by_a_step else None  # the wide batch is then the second one
        return one, self.jax.train(self.batches[1:2]).grad_norms[0] if other is None else other

    @functools.cached_property
    def config(self) -> TrainConfig:
        """With a limit of the gradient norm between those of the first two batches, so that one of them is clipped."""
        config = self.plan.config
        if not min(self.norms) < config.optim.max_grad_norm < max(self.norms):
            limit = float(np.float32(math.sqrt(math.prod(self.norms))))
            self.plan.notes.append(
                f"max_grad_norm {limit:.3g}, between the norms of two batches (the run's: "
                f"{config.optim.max_grad_norm:g})"
            )
            config = config.with_options(max_grad_norm=limit)
        self.jax.limit = config.optim.max_grad_norm
        return config

    @property
    def _by_a_step(self) -> bool:
        """Where the gradients have the size of the steps, the steps' program has them: one less is compiled."""
        return self.plan.wide == self.plan.sizes and self.recomputes is None

    # gradients

    def gradients(self, model: Any) -> list[Row]:
        """Of a batch beyond every threshold of the code; then with biases that send all tokens to one expert."""
        rows = self._gradient_rows(model, self.subject.weights, "")
        if not jax.tree.leaves(self.subject.weights.routing_bias):
            self.not_compared.append("gradients where one expert has all tokens: no bias steers these routers")
            return rows
        with one_expert_for_all(model, self.subject.weights) as weights:
            return rows + self._gradient_rows(model, weights, ", one expert for all")

    def _gradient_rows(self, model: Any, weights: Weights, which: str) -> list[Row]:
        theirs = torch_gradients(model, self.plan.config, self.wide_batch)
        tolerances = self.subject.tolerances

        def compare(ours: Gradients) -> list[Row]:
            return [
                compare_numbers("gradients", f"training loss{which}", ours.loss, theirs.loss, tolerances.forward),
                *self._leaves(ours, theirs, f"gradients{which}"),
            ]

        return self._rows(
            "gradients",
            Comparison(
                lambda: compare(self._free_gradients if not which else self._gradients_of(weights)),
                lambda: self._flips(weights, self.wide_batch, theirs.experts),
                lambda: compare(self._gradients_of(weights, theirs.experts)),
            ),
            self.wide_batch.size,
        )

    def _gradients_of(self, weights: Weights, experts: np.ndarray | None = None) -> Gradients:
        gradients = self.jax.gradients_of_a_step if self._by_a_step else self.jax.gradients
        return gradients(self.wide_batch, experts, weights)

    @functools.cached_property
    def _free_gradients(self) -> Gradients:
        return self._gradients_of(self.subject.weights)

    def _leaves(self, ours: Gradients, theirs: Gradients, what: str) -> list[Row]:
        """Those of a gradient; a leaf that is zero in theory is judged by the size of what it is summed from."""
        rows, zero = [], ZERO["lifted" if self.subject.precision == "float64" else "own"]
        for row in compare_leaves("gradients", what, ours.grads, theirs.grads, self.subject.tolerances.gradient):
            scale = zero * theirs.scale_of(row.leaf)
            values = [side.grads.get(row.leaf) for side in (ours, theirs)]
            if not row.passed and all(v is not None and np.linalg.norm(v) <= scale for v in values):
                self._dead.add(row.leaf)
                note = f"zero in theory: below {zero:g} of what it is summed from, on both sides"
                row = dataclasses.replace(row, passed=True, relative_l2=None, cosine=None, note=note)
            # a row of a table may get one gradient, and a bias a sum of them, in the compute dtype
            if self.subject.precision == "bfloat16" and "embed" not in row.leaf and np.ndim(values[0]) == 2:
                row = still_float32(row, values[0])
            rows.append(row)
        return rows

    # one step

    @functools.cached_property
    def _moments(self):
        # after the warm-up: the first update has the rate 0, and zero moments would hide the scale of the gradient
        config = self.plan.config
        return random_moments(config, self.subject.weights, count=config.schedule.warmup_steps + 1)

    def step(self, model: Any) -> list[Row]:
        """One step on each of two batches, from the same state: one with clipped gradients, one without."""
        limit = self.config.optim.max_grad_norm
        below = [norm < limit for norm in self.norms]
        if all(below) or not any(below):
            self.not_compared.append(f"the other side of max_grad_norm = {limit:.3g}")
        rows: list[Row] = []
        for batch in sorted((0, 1), key=below.__getitem__):
            rows += self._step_rows(model, batch, ", norm below the limit" if below[batch] else "")
        return rows

    def _free(self, first: int, last: int, moments: Any = None) -> Trained:
        """The Flax model's training on some batches, with its own choice of experts."""
        key = (first, last, moments is None)
        if key not in self._trained:
            self._trained[key] = self.jax.train(self.batches[first:last], moments)
        return self._trained[key]

    def _step_rows(self, model: Any, batch: int, which: str) -> list[Row]:
        batches = self.batches[batch : batch + 1]
        theirs = torch_train(model, self.config, batches, self._moments)

        def compare(experts: list[np.ndarray] | None) -> list[Row]:
            free = experts is None
            ours = (
                self._free(batch, batch + 1, self._moments) if free else self.jax.train(batches, self._moments, experts)
            )
            return self._rows_of_a_step(model, batches, which, (ours, theirs), experts)

        return self._rows(
            "step",
            Comparison(
                lambda: compare(None),
                lambda: self._flips(self.subject.weights, batches[0], theirs.experts[0]),
                lambda: compare(theirs.experts),
            ),
            batches.size,
        )

    def _rows_of_a_step(
        self,
        model: Any,
        batches: np.ndarray,
        which: str,
        sides: tuple[Trained, Trained],
        experts: list[np.ndarray] | None,
    ) -> list[Row]:
        """In bfloat16 gradients differ by rounding. What a step does with them is float32, and so PyTorch's optimizer
        gets those of Flax: from there on, both sides agree as in a float32 model."""
        (ours, theirs), tolerances, numbers = sides, self.subject.tolerances, TOLERANCES["float32"].forward
        narrow, first = self.subject.precision == "bfloat16", tolerances.update
        rows = [self._number("gradient norm", which, ours.grad_norms, theirs.grad_norms, tolerances.gradient)]
        same = theirs
        if narrow:
            same, first = self._on_the_same_gradients(model, ours, theirs.experts[0], self.config), tolerances.gradient
            what = "norm of the same gradients"
            rows.append(self._number(what, which, ours.grad_norms, same.grad_norms, tolerances.update))
        moments = compare_leaves("step", f"first moments{which}", ours.mu, theirs.mu, first)
        rows += [still_float32(row, ours.mu[row.leaf]) if narrow and row.leaf in ours.mu else row for row in moments]
        rows += compare_leaves("step", f"second moments{which}", ours.nu, same.nu, tolerances.update)
        rows += self._update_rows(model, batches, which, (ours, same), experts)
        return [
            *rows,
            *self._bias_rows("step", ours, theirs, which),
            self._number("next learning rate", which, ours.rates, theirs.rates, numbers),
            self._number("expert load", which, ours.loads, theirs.loads, numbers),
        ]

    def _number(
        self, what: str, which: str, ours: Sequence[float], theirs: Sequence[float], tolerance: Tolerance
    ) -> Row:
        return compare_numbers("step", f"{what}{which}", ours[0], theirs[0], tolerance)

    def _on_the_same_gradients(self, model: Any, ours: Trained, experts: np.ndarray, config: TrainConfig) -> Trained:
        """The step of PyTorch's optimizer from the gradients that Flax had."""
        given = self.jax.gradients_before(ours, self._named(self._moments.mu)), experts
        return torch_train(model, config, self.batches[:1], self._moments, given)

    def _update_rows(
        self,
        model: Any,
        batches: np.ndarray,
        which: str,
        sides: tuple[Trained, Trained],
        experts: list[np.ndarray] | None,
    ) -> list[Row]:
        """Those of the update. Where it is too small for its parameters, it is compared at a higher rate, too."""
        rows, (ours, theirs) = self._updates(which, *sides), sides
        hidden = {row.leaf for row in rows if row.note == STORED}
        if not hidden:
            return rows
        own = self.config.optim.learning_rate
        rate = max(RESOLVED_RATE, 10 * own)
        config = self.config.with_options(learning_rate=rate)
        ours = self.jax.train(batches, self._moments, experts, rate=rate)
        if self.subject.precision == "bfloat16":
            theirs = self._on_the_same_gradients(model, ours, theirs.experts[0], config)
        else:
            theirs = torch_train(model, config, batches, self._moments)
        note = f"at a learning rate of {rate:g}: that of the run, {own:g}, changes less than the parameters' rounding"
        resolved = {row.leaf: row for row in self._updates(which, ours, theirs)}
        unseen = [leaf for leaf in hidden if resolved[leaf].note == STORED]
        if unseen:
            where = f"below the rounding of their parameters, also at a rate of {rate:g}"
            self.not_compared.append(f"updates {where}: {listed(unseen)}")
        notes = {leaf: "; ".join(filter(None, [note, row.note])) for leaf, row in resolved.items()}
        return [
            dataclasses.replace(resolved[row.leaf], note=notes[row.leaf]) if row.leaf in hidden else row for row in rows
        ]

    def _updates(self, which: str, ours: Trained, theirs: Trained) -> list[Row]:
        subject, tolerance = self.subject, self.subject.tolerances.update
        before, start = self._named(subject.weights.params), self._named(self._moments.mu)
        beta, narrow = self.plan.config.optim.muon_momentum, subject.precision == "bfloat16"
        changes, rows = [_change(before, side) for side in (ours, theirs)], []
        for row in compare_leaves("step", f"update{which}", *changes, tolerance):
            if row.leaf in before and row.leaf in theirs.params and row.leaf in ours.params:
                leaf = row.leaf
                row = as_stored(row, Update(before[leaf], ours.params[leaf], theirs.params[leaf]), tolerance)
                if narrow and leaf in theirs.mu and leaf not in theirs.nu:  # Muon's
                    apart = math.inf if row.relative_l2 is None else row.relative_l2
                    passed = row.passed or apart <= MUON_BFLOAT16.relative_l2
                    momentum = theirs.mu[leaf].astype(np.float64)
                    argument = momentum - beta * start[leaf] + beta * momentum
                    row = of_iteration(dataclasses.replace(row, passed=passed, tolerance=MUON_BFLOAT16.name), argument)
            rows.append(row)
        return rows

    def _named(self, params: Any) -> Named:
        return torch_named(self.subject.config, params, interleaved=self.subject.interleaved)

    # a trajectory

    def trajectory(self, model: Any) -> list[Row]:
        """All steps; fewer where this training amplifies rounding so much that two right programs part."""
        rows, steps, bound = [], len(self.batches), None
        while True:
            theirs = torch_train(model, self.config, self.batches[:steps])
            plain = Amplification.none(self.subject.tolerances.trajectory, steps)
            rows = self._trajectory_rows(theirs, plain)
            if all(row.passed for row in rows):
                break
            bound = self._amplification(theirs.experts)
            if bound is None:
                break
            if bound.parameters.relative_l2 < MAX_AMPLIFIED or steps == MIN_STEPS:
                rows = self._trajectory_rows(theirs, bound)
                break
            steps = max(MIN_STEPS, steps // 2)  # too wild to be compared
        if steps < len(self.batches):
            self.not_compared.append(
                f"steps {steps + 1} to {len(self.batches)} of the trajectory: by then rounding alone changes "
                f"parameters by more than {MAX_AMPLIFIED:g}"
            )
        return [*rows, self._rates_row()]

    def _trajectory_rows(self, theirs: Trained, allowed: Amplification) -> list[Row]:
        steps = len(theirs.losses)

        def compare(ours: Trained, replayed: bool) -> list[Row]:
            self.curve = _curve(ours, theirs, replayed, allowed.losses)
            apart, limit = self.curve.first_difference, self.config.optim.max_grad_norm
            tolerance = allowed.parameters._replace(relative_l2=float(allowed.losses.max()))
            losses = compare_arrays(
                "trajectory", "losses", "", np.asarray(ours.losses), np.asarray(theirs.losses), tolerance
            )
            clipped = sum(norm > limit for norm in ours.grad_norms)
            notes = [apart and f"first at step {apart}", allowed.note, f"{clipped} of {steps} steps clipped"]
            losses = dataclasses.replace(
                losses, passed=losses.passed and apart is None, note="; ".join(filter(None, notes))
            )
            parameters = compare_leaves("trajectory", "parameters", ours.params, theirs.params, allowed.parameters)
            return [
                losses,
                *(_not_judged(row, row.leaf in self._dead) for row in parameters),
                *self._bias_rows("trajectory", ours, theirs),
            ]

        @functools.cache
        def replay() -> tuple[Trained, Flips]:
            found: list[Flips] = []

            def record_flips(step: int, weights: Weights) -> None:
                found.append(self._flips(weights, self.batches[step], theirs.experts[step]))

            trained = self.jax.train(self.batches[:steps], None, theirs.experts, record_flips)
            return trained, total_flips(found)

        # the scores may differ as much as the weights
        near_tie = max(self.subject.tolerances.near_tie, allowed.parameters.relative_l2)
        return self._rows(
            "trajectory",
            Comparison(
                lambda: compare(self._free(0, steps), False), lambda: replay()[1],
                lambda: compare(replay()[0], True),
            ),
            self.batches[:steps].size,
            # a router whose gradient is zero in theory moves by rounding alone
            math.inf if any("router" in leaf or "mlp.gate." in leaf for leaf in self._dead) else near_tie,
        )  # fmt: skip

    def _amplification(self, experts: list[np.ndarray]) -> Amplification | None:
        """How far this training amplifies rounding; None if by no more than the tolerance says.

        High rates make training chaotic: two correct programs then part. The Flax model is trained twice with the same
        experts, the second time from weights with a relative change of a few units of roundoff.
        """
        tolerance, batches = self.subject.tolerances.trajectory, self.batches[: len(experts)]
        changed = _rounded(self.subject.weights, self.subject.precision)
        starts = (self.subject.weights, changed)
        runs = [self.jax.train(batches, None, experts, weights=weights) for weights in starts]
        parameters = compare_leaves("", "", runs[0].params, runs[1].params, tolerance)
        largest = AMPLIFIED * max(
            (row.relative_l2 or 0.0 for row in parameters if row.leaf not in self._dead), default=0
        )
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

    def _rates_row(self) -> Row:
        """The learning rate at every step of the schedule, as PyTorch's own class has it."""
        config = self.plan.config
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim.learning_rate)
        schedule, theirs = make_schedule(optimizer, config.schedule, config.optim.learning_rate), []
        for _ in range(config.schedule.steps + 1):
            theirs.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        with jax_precision("float32"):
            counts = np.arange(config.schedule.steps + 1)
            ours = np.asarray(learning_rate(StepNumbers.of(config.optim, config.schedule), counts))
        tolerance = TOLERANCES["float32"].forward
        return compare_arrays("trajectory", "learning rates", "", ours, np.asarray(theirs), tolerance)

    # what they share

    def _rows(self, rung: str, comparison: Comparison, tokens: int, near_tie: float | None = None) -> list[Row]:
        limit = self.subject.tolerances.near_tie if near_tie is None else near_tie
        free = self.subject.precision != "bfloat16"
        return comparison.rows(rung, tokens * self.subject.config.moe_layers, limit, free=free)

    def _flips(self, weights: Weights, batch: np.ndarray, experts: np.ndarray) -> Flips:
        """The choices that Flax would make differently from the given experts (A,L,B,T,k) of a step."""
        documents = documents_of(self.plan.config.data, batch.shape[-1])
        mask = None if documents is None else np.broadcast_to(documents, batch.shape[1:])
        return total_flips(
            [
                self.subject.flips(weights, np.where(micro == IGNORED, 0, micro), chosen, mask)
                for micro, chosen in zip(batch, experts, strict=True)
            ]
        )

    def _bias_rows(self, rung: str, ours: Trained, theirs: Trained, which: str = "") -> list[Row]:
        """The routing bias is a sum of signs: if the choices are the same, only its rounding differs."""
        master = "float64" if self.subject.precision == "float64" else "float32"
        tolerance = TOLERANCES[master].forward._replace(name="routing bias", max_over_std=math.inf)
        return compare_leaves(rung, f"routing bias{which}", ours.routing_bias, theirs.routing_bias, tolerance)


def _rounded(weights: Weights, precision: str) -> Weights:
    """The weights with a relative change of `ROUNDINGS` units of roundoff in a random direction."""
    rng = np.random.default_rng(0)
    dtype = "float64" if precision == "float64" else "float32"
    # in bfloat16 one rounding, as the masters are float32
    size = 2.0**-9 if precision == "bfloat16" else ROUNDINGS * np.finfo(dtype).eps / 2

    def change(leaf) -> np.ndarray:
        leaf = np.asarray(leaf, dtype)
        return (leaf * (1 + size * rng.choice([-1, 1], leaf.shape))).astype(dtype)

    return weights._replace(params=jax.tree.map(change, weights.params))


def _curve(ours: Trained, theirs: Trained, replayed: bool, limits: np.ndarray) -> Curve:
    pairs = zip(ours.losses, theirs.losses, limits, strict=True)
    apart = (step for step, (a, b, limit) in enumerate(pairs, 1) if not abs(a - b) <= limit * abs(a))
    return Curve(ours.losses, theirs.losses, next(apart, None), replayed)


def _not_judged(row: Row, dead: bool) -> Row:
    """A parameter whose gradient is zero in theory: AdamW divides its rounding by itself."""
    if not dead:
        return row
    return dataclasses.replace(row, passed=True, tolerance="not judged", note="its gradient is zero in theory")


def _change(before: Named, after: Trained) -> Named:
    """The update of the parameters, in float64; a difference in it would be too small to see in the parameters."""
    return {name: values.astype(np.float64) - before[name] for name, values in after.params.items()}
