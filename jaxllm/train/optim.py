"""AdamW with global-norm clipping, and the source's schedule: linear warm-up, then a half cosine to zero.

The update is written here, with optax's functions for the moments, for three reasons. Clipping adds PyTorch's 1e-6
to the norm. A step that is not finite changes nothing, and the updates come from the moments that are kept: selecting
between old and new moments after optax's update would need both in memory, 4 GiB more for customllm-1b. And optax
divides every gradient by the norm: XLA does not repeat a division in each place that reads it, and so keeps a second
copy of all gradients, another 4 GiB.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax

from jaxllm.config import RunConfig
from jaxllm.model.dtypes import Array, Pytree


class AdamState(NamedTuple):
    """AdamW's memory of the updates so far."""

    count: Array  # () int32, updates done
    mu: Pytree  # first moments, a pytree like the parameters
    nu: Pytree  # second moments, likewise

    @classmethod
    def zeros(cls, params: Pytree) -> Self:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return cls(jnp.zeros((), jnp.int32), mu, nu)


def learning_rate(config: RunConfig, count: Array | int) -> Array:
    """Learning rate of update number `count` (from 0): linear from 0 over `warmup_steps`, cosine to 0 at `steps`.

    The formula is that of transformers' `get_cosine_schedule_with_warmup`, whose values the source's log shows. optax's
    schedule rounds differently at the boundary of warm-up and cosine.
    """
    peak, steps, warmup_steps = config.optim.learning_rate, config.schedule.steps, config.schedule.warmup_steps
    count = jnp.asarray(count, jnp.promote_types(jnp.float32, jnp.result_type(float)))
    warmup = count / max(1, warmup_steps)
    progress = (count - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    return peak * jnp.where(count < warmup_steps, warmup, cosine)


def adamw_update(
    config: RunConfig, grads: Pytree, grad_norm: Array, state: AdamState, params: Pytree, facts: Pytree, finite: Array
) -> tuple[Pytree, AdamState]:
    """One update, in the order of PyTorch's AdamW: clip, moments, bias correction, decoupled decay.

    Args:
        grads, params, facts: pytrees alike; facts are `ParameterFacts`.
        grad_norm: () global norm of the gradients; above `max_grad_norm` they are scaled down.
        finite: () bool; where it is False, neither the parameters nor the state change.
    """
    optim = config.optim
    scale = jnp.minimum(1.0, optim.max_grad_norm / (grad_norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
    grads = jax.tree.map(lambda grad: grad * scale, grads)
    new = AdamState(
        count=state.count + 1,
        mu=optax.tree.update_moment(grads, state.mu, optim.beta1, 1),
        nu=optax.tree.update_moment_per_elem_norm(grads, state.nu, optim.beta2, 2),
    )
    kept = tree_where(finite, new, state)
    count = jnp.maximum(kept.count, 1)
    mu = optax.tree.bias_correction(kept.mu, optim.beta1, count)
    nu = optax.tree.bias_correction(kept.nu, optim.beta2, count)
    step_size = -learning_rate(config, state.count)

    def updated(param: Array, m: Array, v: Array, known: Any) -> Array:
        update = m / (jnp.sqrt(v) + optim.adam_eps)
        if known.decays:
            update = update + optim.weight_decay * param
        return param + step_size.astype(param.dtype) * update

    return tree_where(finite, jax.tree.map(updated, params, mu, nu, facts), params), kept


def tree_where(condition: Array, new: Pytree, old: Pytree) -> Pytree:
    """`new` where the condition holds, else `old`. Not a product: zero times a value that is not finite is not zero."""
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), new, old)
