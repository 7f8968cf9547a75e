"""The update of the parameters: clipping by the global norm, AdamW or Muon with AdamW, and the learning rate.

AdamW's update is written here, with optax's functions for the moments, for three reasons. Clipping adds PyTorch's 1e-6
to the norm. A step that is not finite changes nothing, and the updates come from the moments that are kept: selecting
between old and new moments after optax's update would need both in memory, 4 GiB more for customllm-1b. And optax
divides every gradient by the norm: XLA does not repeat a division in each place that reads it, and so keeps a second
copy of all gradients, another 4 GiB.
"""

import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxllm.config import RunConfig
from jaxllm.model.decoder import model_facts
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layers import ParameterFacts
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.train.muon import muon_update


class OptimizerState(NamedTuple):
    """The optimizer's memory of the updates so far."""

    count: Array  # () int32, updates done
    mu: Pytree  # first moments, or Muon's momentum: a pytree like the parameters
    nu: Pytree  # second moments of the parameters that AdamW updates

    @classmethod
    def zeros(cls, config: RunConfig, params: Pytree) -> Self:
        mu, nu = (jax.tree.map(jnp.zeros_like, tree) for tree in (params, of_adamw(config, params)))
        return cls(jnp.zeros((), jnp.int32), mu, nu)


def of_adamw(config: RunConfig, tree: Pytree) -> Pytree:
    """The part of a tree like the parameters that AdamW updates: all of it, or without the matrices of the layers."""
    return tree if config.optim.optimizer == "adamw" else _divided(tree, model_facts(config.model)[0])[1]


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


def learning_rate(config: RunConfig, count: Array | int) -> Array:
    """Learning rate of update number `count` (from 0): linear from 0 over `warmup_steps`, then down to 0 at `steps`.

    The formulas are those of transformers' `get_cosine_schedule_with_warmup`, whose values the source's log shows, and
    `get_wsd_schedule`. optax's schedule rounds differently at the boundary of warm-up and cosine.
    """
    schedule, peak = config.schedule, config.optim.learning_rate
    count = jnp.asarray(count, jnp.promote_types(jnp.float32, jnp.result_type(float)))
    warmup = count / max(1, schedule.warmup_steps)
    start = max(schedule.steps - schedule.falling_steps, schedule.warmup_steps)
    progress = jnp.clip((count - start) / schedule.falling_steps, 0.0, 1.0)
    falling = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if schedule.schedule == "cosine" else 1.0 - progress
    return peak * jnp.where(count < schedule.warmup_steps, warmup, falling)


def update(
    config: RunConfig,
    grads: Pytree,
    grad_norm: Array,
    state: OptimizerState,
    params: Pytree,
    finite: Array,
    layout: Layout = ONE_DEVICE,
) -> tuple[Pytree, OptimizerState]:
    """One update of the parameters.

    Args:
        grads, params: pytrees alike.
        grad_norm: () global norm of the gradients; above `max_grad_norm` they are scaled down.
        finite: () bool; where it is False, neither the parameters nor the state change.
    """
    scale = jnp.minimum(1.0, config.optim.max_grad_norm / (grad_norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
    grads = jax.tree.map(lambda grad: grad * scale, grads)
    facts, _ = model_facts(config.model)
    trees = (grads, state.mu, params, facts)
    count, rate = tree_where(finite, state.count + 1, state.count), learning_rate(config, state.count)
    adamw = functools.partial(adamw_update, config, nu=state.nu, count=count, rate=rate, finite=finite)
    if config.optim.optimizer == "adamw":
        new, mu, nu = adamw(*trees)
    else:
        matrices, rest = zip(*(_divided(tree, facts) for tree in trees), strict=True)
        new, mu, nu = adamw(*rest)
        new_matrices, momentum = muon_update(config, *matrices, rate=rate, finite=finite, layout=layout)
        new, mu = _joined(new_matrices, new), _joined(momentum, mu)
    return new, OptimizerState(count, mu, nu)


def adamw_update(
    config: RunConfig,
    grads: Pytree,
    mu: Pytree,
    params: Pytree,
    facts: Pytree,
    *,
    nu: Pytree,
    count: Array,
    rate: Array,
    finite: Array,
) -> tuple[Pytree, Pytree, Pytree]:
    """One update, in the order of PyTorch's AdamW: moments, bias correction, decoupled decay.

    Args:
        grads, mu, params, facts, nu: pytrees alike: clipped gradients, moments, and `ParameterFacts`.
        count: () updates done, with this one if it is finite.
        rate: () learning rate.
        finite: as in `update`.

    Returns the parameters and both moments.
    """
    optim = config.optim
    new = (
        optax.tree.update_moment(grads, mu, optim.beta1, 1),
        optax.tree.update_moment_per_elem_norm(grads, nu, optim.beta2, 2),
    )
    kept = tree_where(finite, new, (mu, nu))
    count = jnp.maximum(count, 1)
    corrected = (
        optax.tree.bias_correction(moment, beta, count)
        for moment, beta in zip(kept, (optim.beta1, optim.beta2), strict=True)
    )

    def updated(param: Array, m: Array, v: Array, known: ParameterFacts) -> Array:
        change = m / (jnp.sqrt(v) + optim.adam_eps)
        if known.decays:
            change = change + optim.weight_decay * param
        return param - rate.astype(param.dtype) * change

    return tree_where(finite, jax.tree.map(updated, params, *corrected, facts), params), *kept


def tree_where(condition: Array, new: Pytree, old: Pytree) -> Pytree:
    """`new` where the condition holds, else `old`. Not a product: zero times a value that is not finite is not zero."""
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), new, old)
