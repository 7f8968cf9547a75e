"""A frozen linear map with a low-rank update (LoRA, arXiv:2106.09685), and the gradients of the update alone.

M rows    K in    N out    r rank
"""

import functools

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.kernels.matmul import in_dtype, matmul, save_for_backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def adapted_linear(scale: float, out_dtype: jnp.dtype, x: Array, weight: Array, a: Array, b: Array) -> Array:
    """`x @ weight + scale * (x @ a) @ b`: (..., K), frozen (K,N), masters (K,r) and (r,N) -> (..., N).

    The products are in the dtype of x, and their sum is rounded once. The weight has no gradient; those of a and b
    accumulate in float32 or wider.
    """
    acc_dtype, rows = at_least_float32(x.dtype), x.reshape(-1, x.shape[-1])
    low = matmul(rows, in_dtype(a, x.dtype))
    y = matmul(rows, in_dtype(weight, x.dtype), acc_dtype) + scale * matmul(low, in_dtype(b, x.dtype), acc_dtype)
    return y.astype(out_dtype).reshape(*x.shape[:-1], weight.shape[1])


def _forward(scale: float, out_dtype: jnp.dtype, x: Array, weight: Array, a: Array, b: Array):
    # the sum is saved and not its terms; x @ a is computed again, which is little
    return save_for_backward(adapted_linear(scale, out_dtype, x, weight, a, b)), (x, weight, a, b)


def _backward(scale: float, out_dtype: jnp.dtype, saved: tuple[Array, Array, Array, Array], d_y: Array):
    x, weight, a, b = saved
    dtype, acc_dtype = x.dtype, at_least_float32(x.dtype)
    rows, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1]).astype(dtype)
    low = matmul(rows, in_dtype(a, dtype))
    d_low = (scale * matmul(d_y, in_dtype(b, dtype), acc_dtype, transpose_b=True)).astype(dtype)
    d_a = matmul(rows, d_low, acc_dtype, transpose_a=True)
    d_b = scale * matmul(low, d_y, acc_dtype, transpose_a=True)
    d_x = matmul(d_y, in_dtype(weight, dtype), acc_dtype, transpose_b=True)
    d_x += matmul(d_low, in_dtype(a, dtype), acc_dtype, transpose_b=True)
    return d_x.astype(dtype).reshape(x.shape), None, d_a.astype(a.dtype), d_b.astype(b.dtype)


adapted_linear.defvjp(_forward, _backward)
