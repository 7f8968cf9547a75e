"""The matrix product: the one place that knows what XLA's CPU needs to multiply bfloat16 fast.

Its fast kernel takes operands that are physically row-major, and a float32 result; any other form takes twice as long.
A transposed array is only a view, which XLA folds into the product through every operation but a constraint of the
layout. On other devices, and in other dtypes, the product is XLA's own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jaxllm.model.dtypes import Array, at_least_float32

FEW_ROWS = 16
"""Products of fewer rows read the weights once in any form; a copy of them would cost more than it saves."""


def matmul(a: Array, b: Array, out_dtype: jnp.dtype | None = None) -> Array:
    """`a @ b` over the last two axes, accumulated in float32 or wider: (..., M,K), (..., K,N) -> (..., M,N).

    `out_dtype`: of the result; None: that of `a`. It has no gradient on a CPU in bfloat16: see `linear`.
    """
    out_dtype = a.dtype if out_dtype is None else out_dtype

    def usual(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, preferred_element_type=out_dtype)

    def row_major_operands(a: Array, b: Array) -> Array:
        product = jnp.matmul(_row_major(a), _row_major(b), preferred_element_type=jnp.float32)
        return _row_major(product).astype(out_dtype)

    if a.dtype != jnp.bfloat16 or a.shape[-2] < FEW_ROWS:
        return usual(a, b)
    return jax.lax.platform_dependent(a, b, cpu=row_major_operands, default=usual)


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def linear(x: Array, weight: Array, out_dtype: jnp.dtype | None = None) -> Array:
    """`x @ weight` in the dtype of x: (..., K), masters (K,N) -> (..., N).

    The weight's gradient accumulates in float32 or wider and is returned in the master's dtype.
    """
    y: Array = _linear(out_dtype or x.dtype, x.reshape(-1, x.shape[-1]), weight)
    return y.reshape(*x.shape[:-1], weight.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(out_dtype: jnp.dtype, x: Array, weight: Array) -> Array:  # (M,K), (K,N) -> (M,N)
    return matmul(x, weight.astype(x.dtype), out_dtype)


def _forward(out_dtype: jnp.dtype, x: Array, weight: Array):
    narrow = weight.astype(x.dtype)
    return matmul(x, narrow, out_dtype), (x, narrow, jnp.zeros((0,), weight.dtype))


def _backward(out_dtype: jnp.dtype, saved: tuple[Array, Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, weight, like_master = saved
    d_y = d_y.astype(x.dtype)
    d_weight = matmul(x.T, d_y, at_least_float32(x.dtype))
    return matmul(d_y, weight.T), d_weight.astype(like_master.dtype)


_linear.defvjp(_forward, _backward)
