"""The matrix product: the one place that knows what XLA's CPU needs to multiply fast.

In bfloat16 its fast kernel takes operands that are physically row-major, and a float32 result; any other form takes
twice as long. In float32 only the transpose of the first operand is slow, by 7%. A transposed array is only a view,
which XLA folds into the product through every operation but a constraint of the layout. On other devices, and in
float64, the product is XLA's own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.export import is_symbolic_dim
from jaxtyping import Float

from jaxllm.model.dtypes import Array, DTypeLike, at_least_float32

FEW_ROWS = 32
"""Up to this many rows, as in decoding, float32 operands and the experts' weights are not copied into a faster form:
that would cost more than it saves."""

SAVED = "saved"
"""The name that `save_for_backward` gives, for the policy of `jax.checkpoint`: see `layout.checkpoint`."""


def save_for_backward(x: Array) -> Array:
    """Mark `x` so that the checkpoint policy saves it instead of recomputing it."""
    return checkpoint_name(x, SAVED)


def matmul(
    a: Array, b: Array, out_dtype: DTypeLike | None = None, *, transpose_a: bool = False, transpose_b: bool = False
) -> Array:
    """`a @ b` over the last two axes, accumulated in float32 or wider: (..., M,K), (..., K,N) -> (..., M,N).

    Args:
        out_dtype: of the result; None: that of `a`.
        transpose_a, transpose_b: multiply by the transpose of `a`, (..., K,M), or of `b`, (..., N,K).

    Where it changes layouts, on a CPU in bfloat16 or with `transpose_a`, it has no gradient: see `linear`.
    """
    out_dtype = a.dtype if out_dtype is None else out_dtype

    def transposed(a: Array, b: Array) -> tuple[Array, Array]:
        return a.mT if transpose_a else a, b.mT if transpose_b else b

    def usual(a: Array, b: Array) -> Array:
        return jnp.matmul(*transposed(a, b), preferred_element_type=out_dtype)

    rows = a.shape[-1 if transpose_a else -2]
    rows = None if is_symbolic_dim(rows) else rows  # in jax.export

    def row_major_operands(a: Array, b: Array) -> Array:
        left = _row_major_transpose(a) if transpose_a else _row_major(a)
        if a.dtype != jnp.bfloat16:
            return jnp.matmul(left, b.mT if transpose_b else b, preferred_element_type=out_dtype)
        right = _row_major_transpose(b) if transpose_b else _row_major(b)
        if rows == 1:  # for one row, XLA writes all of b in float32 first; for two it reads b as it is
            left = jnp.concatenate([left, left], axis=-2)
        product = _row_major(jnp.matmul(left, right, preferred_element_type=jnp.float32))
        return product[..., :rows, :].astype(out_dtype)

    is_small = rows is not None and rows <= FEW_ROWS
    if a.dtype != jnp.bfloat16 and (is_small or a.dtype != jnp.float32 or not transpose_a):
        return usual(a, b)
    return jax.lax.platform_dependent(a, b, cpu=row_major_operands, default=usual)


def in_dtype(weight: Array, dtype: jnp.dtype) -> Array:
    """A weight in the compute dtype. Slice an array of several weights first."""
    return weight.astype(dtype)


def cast(x: Array, dtype: jnp.dtype) -> Array:
    """`in_dtype`, by itself: XLA's CPU would join it to what reads it, such as a copy that is slower in float32.

    It has no gradient.
    """
    if x.dtype == dtype:
        return x
    return jax.lax.platform_dependent(
        x, cpu=lambda x: _row_major(in_dtype(x, dtype)), default=lambda x: in_dtype(x, dtype)
    )


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _row_major_transpose(x: Array) -> Array:
    """The last two axes swapped in memory. Without the first constraint XLA transposes while it computes x, a number at
    a time: ten times as long for a slice of the weights that is cast."""
    return _row_major(_row_major(x).mT)


def linear(
    x: Float[Array, "*batch I"],
    weight: Float[Array, "I O"],
    out_dtype: DTypeLike | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch O"]:
    """`x @ weight` in the compute dtype (None: that of x); the weight is a master.

    The weight's gradient accumulates in float32 or wider and is returned in the master's dtype.
    """
    compute_dtype = jnp.dtype(compute_dtype or x.dtype)
    return _linear(compute_dtype, jnp.dtype(out_dtype or compute_dtype), x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(dtype: jnp.dtype, out_dtype: jnp.dtype, x: Array, weight: Array) -> Array:  # (..., K), (K,N) -> (..., N)
    y = matmul(_rows(x).astype(dtype), in_dtype(weight, dtype), out_dtype)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def _forward(dtype: jnp.dtype, out_dtype: jnp.dtype, x: Array, weight: Array):
    # Saves its arguments as they are: those of several products are saved once, and the layer loop has the masters.
    return save_for_backward(_linear(dtype, out_dtype, x, weight)), (x, weight)


def _backward(dtype: jnp.dtype, out_dtype: jnp.dtype, saved: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, weight = saved
    d_y = _rows(d_y).astype(dtype)
    d_weight = matmul(_rows(x).astype(dtype), d_y, at_least_float32(dtype), transpose_a=True)
    d_x = matmul(d_y, in_dtype(weight, dtype), x.dtype, transpose_b=True)
    return d_x.reshape(x.shape), d_weight.astype(weight.dtype)


def _rows(x: Array) -> Array:  # (..., K) -> (M,K)
    return x.reshape(-1, x.shape[-1])


_linear.defvjp(_forward, _backward)
