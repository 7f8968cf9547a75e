"""Type aliases, and the dtype in which sums are accumulated."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Pytree = Any


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of masters, norms, softmax, router and loss: float32, or float64 in a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)
