"""bfloat16 numbers as their bits, in uint16, where a loop reads or writes a part of an array.

XLA's CPU before JAX 0.12 has no slices of bfloat16. It converts the whole array to float32 and back in each turn of the
loop, or once before it, at twice the memory. It also joins such arrays in float32. It slices and joins integers as they
are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, Pytree


def pack(x: Array) -> Array:
    """The bits of an array of bfloat16; any other array as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def unpack(x: Array) -> Array:
    """The inverse of `pack`. No other array of the model is of uint16."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def packed_like(x: Array, target: Array) -> Array:
    """`x` in the dtype of an array into which it is written, packed if that is."""
    return pack(x.astype(jnp.bfloat16)) if target.dtype == jnp.uint16 else x.astype(target.dtype)


class _Packed(NamedTuple):
    """Marks a residual that is packed here; those that were packed before stay so."""

    bits: Array


def packing_residuals(function: Callable) -> Callable:
    """The body of a scan, with the same gradient, whose residuals (what the backward pass reads) are packed."""

    @jax.custom_vjp
    def packing(*args: Pytree) -> Pytree:
        return function(*args)

    def forward(*args: Pytree) -> tuple[Pytree, Pytree]:
        out, pullback = jax.vjp(function, *args)
        kept: dict[int, _Packed] = {}  # an array that several products read is kept once

        def packed(residual: Array) -> Array | _Packed:
            if residual.dtype != jnp.bfloat16:
                return residual
            return kept.setdefault(id(residual), _Packed(pack(residual)))

        return out, jax.tree.map(packed, pullback)

    def backward(pullback: Pytree, d_out: Pytree) -> Pytree:
        def unpacked(residual: Array | _Packed) -> Array:
            return unpack(residual.bits) if isinstance(residual, _Packed) else residual

        return jax.tree.map(unpacked, pullback, is_leaf=lambda node: isinstance(node, _Packed))(d_out)

    packing.defvjp(forward, backward)
    return packing
