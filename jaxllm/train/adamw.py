"""The update of AdamW, with optax's functions for the moments.

A step that is not finite changes nothing, and the updates are computed from the moments that remain. Selecting between
old and new moments after optax's own update would need both in memory, 4 GiB more for customllm-1b.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from jaxllm.config.groups import OptimConfig
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layers import ParameterFacts


class UpdateScalars(NamedTuple):
    """What all parameters share in one update."""

    count: Int[Array, ""]  # updates done, with this one if it is finite
    rate: Float[Array, ""]  # learning rate
    finite: Bool[Array, ""]  # where it is False, neither the parameters nor the moments change


def adamw_update(
    optim: OptimConfig, grads: Pytree, mu: Pytree, params: Pytree, facts: Pytree, nu: Pytree, scalars: UpdateScalars
) -> tuple[Pytree, Pytree, Pytree]:
    """One update, in the order of PyTorch's AdamW: moments, bias correction, decoupled decay.

    Args:
        grads, mu, params, facts, nu: pytrees alike: clipped gradients, moments, and `ParameterFacts`.

    Returns the parameters and both moments.
    """
    count, rate, finite = scalars
    new = (
        optax.tree.update_moment(grads, mu, optim.beta1, 1),
        optax.tree.update_moment_per_elem_norm(grads, nu, optim.beta2, 2),
    )
    moments = tree_where(finite, new, (mu, nu))
    count = jnp.maximum(count, 1)
    corrected = (
        optax.tree.bias_correction(moment, beta, count)
        for moment, beta in zip(moments, (optim.beta1, optim.beta2), strict=True)
    )

    def updated(param: Array, m: Array, v: Array, known: ParameterFacts) -> Array:
        change = m / (jnp.sqrt(v) + optim.adam_eps)
        if known.decays:
            change = change + optim.weight_decay * param
        return param - rate.astype(param.dtype) * change

    return tree_where(finite, jax.tree.map(updated, params, *corrected, facts), params), *moments


def tree_where(condition: Bool[Array, ""], new: Pytree, old: Pytree) -> Pytree:
    """`new` where the condition holds, else `old`. Not a product: zero times a value that is not finite is not zero."""
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), new, old)
