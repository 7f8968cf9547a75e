"""bfloat16 numbers as their bits, in uint16, inside a loop that reads or writes parts of an array.

XLA's CPU before JAX 0.12 has no slices of bfloat16. It converts the whole array to float32 and back in each turn of the
loop, or once before it, at twice the memory. It also joins such arrays in float32. It slices and joins integers as they
are. A loop packs what it writes and unpacks what it returns: no other code sees packed arrays. XLA removes an `unpack`
next to a `pack`, so a loop within a loop costs nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, Pytree

NEEDED = jax.__version_info__ < (0, 12)
"""Whether XLA's CPU needs it."""


def pack(tree: Pytree, needed: bool = NEEDED) -> Pytree:
    """The bits of arrays of bfloat16, if needed; other arrays as they are."""
    return jax.tree.map(_bits, tree) if needed else tree


def unpack(tree: Pytree, needed: bool = NEEDED) -> Pytree:
    """The inverse of `pack`. No other array of the model is of uint16."""
    return jax.tree.map(_numbers, tree) if needed else tree


def _bits(x: Any) -> Any:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _numbers(x: Any) -> Any:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def read(x: Array, i: Any) -> Array:
    """`x[i]` along the first axis, inside a loop that only reads x: (L,...), one index or several.

    The barrier keeps XLA from converting all of x before the loop. It then converts only what is read.
    """
    if NEEDED and x.dtype == jnp.bfloat16:
        x, i = jax.lax.optimization_barrier((x, jnp.asarray(i)))
    return x[i] if jnp.ndim(i) else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
