"""Type aliases, the dtype in which sums are accumulated, and checks of dtypes that come from outside."""

from collections.abc import Collection
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import Precision
from jaxllm.errors import UserError, shown

Array = jax.Array
Pytree = Any
DTypeLike = jnp.dtype | type[Any]
"""A dtype, or its scalar type such as `jnp.float32`."""


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of masters, norms, softmax, router and loss: float32, or float64 in a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


def check_dtype(dtype: Any, name: str = "dtype", allowed: Collection[str] | None = None) -> jnp.dtype:
    """The dtype that was asked for. Raises a UserError if it is not `allowed`; None: those that models compute in."""
    if allowed is None:
        allowed = [*get_args(Precision), *["float64"] * (jnp.result_type(float) == jnp.float64)]
    try:
        known = None if dtype is None else jnp.dtype(dtype)
    except (TypeError, ValueError):
        known = None
    if known is None or known.name not in allowed:
        raise UserError(f"{name} is {shown(known.name if known else dtype)}: choose one of {', '.join(allowed)}")
    return known


def check_floats(name: str, values: Any, finite: bool = True) -> None:
    """Raise a UserError if weights to be written are not floating-point numbers, or some not `finite`: packed bits or
    counts would be numbers with another meaning."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise UserError(f"{name} has the dtype {values.dtype}: a weight must be floating point; nothing was written")
    if finite and not np.isfinite(values).all():
        raise UserError(f"{name} has values that are not finite: weights that diverged are not written")
