"""Linear, embedding, norm and rotary embedding: the pieces that every layer is made of.

Weights are float32 masters (float64 under a float64 model) and are cast to the compute dtype at each product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Array = jax.Array


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of masters, norms, softmax, router and loss: float32, or float64 in a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, at_least_float32(dtype)))


class Linear(nnx.Module):
    """`x @ weight (+ bias)`. The weight is (in, out); PyTorch's is (out, in), and the converter transposes."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.weight = _normal(rngs, (in_features, out_features), std, dtype)
        self.bias = nnx.Param(jnp.zeros((out_features,), at_least_float32(dtype))) if bias else None

    def __call__(self, x: Array, out_dtype: jnp.dtype | None = None) -> Array:  # (..., in) -> (..., out)
        weight = self.weight[...].astype(self.dtype)
        y = jnp.matmul(x.astype(self.dtype), weight, preferred_element_type=out_dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """A table (rows, D), looked up by row."""

    def __init__(self, rows: int, features: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.rows, self.features, self.dtype = rows, features, dtype
        self.weight = _normal(rngs, (rows, features), std, dtype)

    def __call__(self, ids: Array) -> Array:  # (...) -> (..., D)
        return self.weight[...][ids].astype(self.dtype)


class CustomRMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019): computed in float32, returned in x's dtype."""

    def __init__(self, features: int, *, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((features,), at_least_float32(dtype)))

    def __call__(self, x: Array) -> Array:  # (..., D) -> (..., D)
        wide = x.astype(at_least_float32(x.dtype))
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.weight[...]).astype(x.dtype)


class RotaryEmbedding(nnx.Module):
    """Rotary position embedding (Su et al. 2021, section 3.4), rotate-half convention; it has no weights."""

    def __init__(self, features: int, *, theta: float):
        self.features, self.theta = features, theta

    def __call__(self, x: Array, positions: Array) -> Array:  # (B,T,H,r), (B|1,T) -> (B,T,H,r)
        wide = at_least_float32(x.dtype)
        # in double precision on the host, so that both frameworks round the same numbers
        inv_freq = self.theta ** (-np.arange(0, self.features, 2) / self.features)  # (r/2,)
        angles = positions[..., None, None].astype(wide) * inv_freq.astype(wide)  # (B|1,T,1,r/2)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(wide), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
