"""The update of the parameters: clipping by the global norm, AdamW or Muon with AdamW, and the learning rate."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Float, Int

from jaxllm.config import ModelConfig
from jaxllm.config.groups import OptimConfig, ScheduleConfig
from jaxllm.model.decoder import CustomLLM, model_facts
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.train.adamw import UpdateScalars, adamw_update, tree_where
from jaxllm.train.muon import muon_update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepNumbers:
    """What a step's program takes as arguments, so that other numbers compile nothing: scalars in float32 or wider.

    Reciprocals are what XLA makes of a division by a constant.
    """

    # each is () in float32 or wider: NumPy's on the host, JAX's in a program
    peak: Any  # of the learning rate
    warmup_steps: Any
    per_warmup_step: Any  # 1 / warmup_steps
    falls_from: Any  # the update from which on the rate falls
    per_falling_step: Any  # 1 / the number of steps over which it falls
    max_grad_norm: Any
    schedule: Literal["cosine", "wsd"] = field(metadata={"static": True})

    @classmethod
    def of(cls, optim: OptimConfig, schedule: ScheduleConfig) -> "StepNumbers":
        """The numbers of a run, on the host."""
        one = np.dtype(jnp.result_type(float)).type(1)
        warmup, falling = schedule.warmup_steps, schedule.falling_steps
        falls_from = max(schedule.steps - falling, warmup)
        numbers = (optim.learning_rate, warmup, one / max(1, warmup), falls_from, one / falling, optim.max_grad_norm)
        return cls(*(one * number for number in numbers), schedule=schedule.schedule)


UNREAD = OptimConfig()
"""Holds the place of numbers that are arguments of a step."""


def without_numbers(optim: OptimConfig) -> OptimConfig:
    """The options of a step that its program depends on: without those in `StepNumbers`."""
    return replace(optim, learning_rate=UNREAD.learning_rate, max_grad_norm=UNREAD.max_grad_norm)


class OptimizerState(NamedTuple):
    """The optimizer's memory of the updates so far."""

    count: Int[Array, ""]  # updates done
    mu: Pytree  # first moments, or Muon's momentum: a pytree like the parameters
    nu: Pytree  # second moments of the parameters that AdamW updates

    @classmethod
    def zeros(cls, model: ModelConfig, optim: OptimConfig, params: Pytree) -> "OptimizerState":
        mu, nu = (jax.tree.map(jnp.zeros_like, tree) for tree in (params, of_adamw(model, optim, params)))
        return cls(jnp.zeros((), jnp.int32), mu, nu)


def of_adamw(model: ModelConfig, optim: OptimConfig, tree: Pytree) -> Pytree:
    """The part of a tree like the parameters that AdamW updates: all of it, or without the matrices of the layers."""
    return tree if optim.optimizer == "adamw" else _divided(tree, model_facts(model)[0])[1]


def _divided(tree: Pytree, facts: Pytree) -> tuple[Pytree, Pytree]:
    """The parts of a tree like the parameters that Muon updates, and that AdamW does."""
    facts = flatten_dict(facts)
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in flatten_dict(tree).items():
        parts[not facts[path].is_hidden_matrix][path] = leaf
    muon, adamw = map(unflatten_dict, parts)
    return muon, adamw


def _joined(one: Pytree, other: Pytree) -> Pytree:
    """The inverse of `_divided`."""
    return unflatten_dict(flatten_dict(one) | flatten_dict(other))


def learning_rate(numbers: StepNumbers, count: Int[Array, "*batch"] | int) -> Float[Array, "*batch"]:
    """Learning rate of update number `count` (from 0): linearly to `peak`, and after a time down to 0.

    The formulas are those of transformers' `get_cosine_schedule_with_warmup`, whose values the source's log shows, and
    `get_wsd_schedule`. optax's schedule rounds differently at the boundary of warm-up and cosine.
    """
    count = jnp.asarray(count, jnp.promote_types(jnp.float32, jnp.result_type(float)))
    progress = jnp.clip((count - numbers.falls_from) * numbers.per_falling_step, 0.0, 1.0)
    falling = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if numbers.schedule == "cosine" else 1.0 - progress
    return numbers.peak * jnp.where(count < numbers.warmup_steps, count * numbers.per_warmup_step, falling)


def update(
    optim: OptimConfig,
    model: CustomLLM,
    grads: Pytree,
    state: OptimizerState,
    params: Pytree,
    rate: Float[Array, ""],
    finite: Bool[Array, ""],
    layout: Layout = ONE_DEVICE,
) -> tuple[Pytree, OptimizerState]:
    """One update of the parameters.

    Args:
        model: whose parameters they are; Muon computes in its dtype.
        grads, params: pytrees alike; the gradients are clipped.
        rate, finite: as in `UpdateScalars`.
    """
    facts, _ = model_facts(model.config, model.lora)
    scalars = UpdateScalars(tree_where(finite, state.count + 1, state.count), rate, finite)
    trees = (grads, state.mu, params, facts)
    if optim.optimizer == "adamw":
        new, mu, nu = adamw_update(optim, *trees, nu=state.nu, scalars=scalars)
    else:
        matrices, rest = zip(*(_divided(tree, facts) for tree in trees), strict=True)
        new, mu, nu = adamw_update(optim, *rest, nu=state.nu, scalars=scalars)
        new_matrices, momentum = muon_update(optim, *matrices, scalars=scalars, dtype=model.dtype, layout=layout)
        new, mu = _joined(new_matrices, new), _joined(momentum, mu)
    return new, OptimizerState(scalars.count, mu, nu)


def clip_gradients(grads: Pytree, norm: Float[Array, ""], max_norm: Float[Array, ""]) -> Pytree:
    """Scale down gradients whose global `norm` is above `max_norm`, as torch.nn.utils.clip_grad_norm_ does.

    With optax, which divides every gradient by the norm, XLA keeps a second copy of all gradients: it does not repeat a
    division in each place that reads it. That is 4 GiB for customllm-1b.
    """
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads)
