"""Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467), which saves only its input for the backward pass.

Autodiff would save several arrays of its size in float32.

    N rows    D features
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxllm.model.dtypes import Array, at_least_float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rms_norm(eps: float, x: Float[Array, "*batch D"], weight: Float[Array, " D"]) -> Float[Array, "*batch D"]:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last axis, in the dtype of x.

    It is computed in float32 or wider.
    """
    normed, _ = _normed(eps, x)
    return (normed * weight).astype(x.dtype)


def _normed(eps: float, x: Array) -> tuple[Array, Array]:  # (..., D) -> (..., D), (..., 1)
    upcast = x.astype(at_least_float32(x.dtype))
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(upcast), axis=-1, keepdims=True) + eps)
    return upcast * inverse_rms, inverse_rms


def _backward(eps: float, saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, weight = saved
    normed, inverse_rms = _normed(eps, x)
    d_out = d_out.astype(normed.dtype)
    d_normed = d_out * weight
    d_x = inverse_rms * (d_normed - normed * jnp.mean(d_normed * normed, axis=-1, keepdims=True))
    d_weight = _sum_of_rows((d_out * normed).reshape(-1, x.shape[-1]))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


def _sum_of_rows(x: Array) -> Array:  # (N,D) -> (D,)
    def product(x: Array) -> Array:  # XLA's sum takes up to forty times as long on a CPU
        return jnp.matmul(jnp.ones(x.shape[0], x.dtype), x, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(axis=0))


rms_norm.defvjp(lambda eps, x, weight: (rms_norm(eps, x, weight), (x, weight)), _backward)
