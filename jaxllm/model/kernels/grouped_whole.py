"""The products of a single expert that every row goes through, on an NVIDIA GPU: a shared expert as one group.

SwiGLU and its gradient are in the kernels of `grouped_triton`. The other products are XLA's own, which are faster for
one group. They take `group_sizes` as those of `grouped_triton` do, and do not read it.

    M rows, all of them in the group    S experts of a stack    X in    Y out
"""

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels.grouped_triton import grouped_swiglu, grouped_swiglu_gradients, new_kept, padding
from jaxllm.model.kernels.matmul import matmul

__all__ = [
    "grouped_matmul",
    "grouped_matmul_transposed",
    "grouped_swiglu",
    "grouped_swiglu_gradients",
    "new_kept",
    "padding",
    "weight_gradients",
]


def grouped_matmul(rows: Array, weight: Array, group_sizes: Array, offset: Array | int = 0) -> Array:
    """`rows @ weight[offset]`: (M,X), (S,X,Y) -> (M,Y)."""
    return matmul(rows, weight[offset])


def grouped_matmul_transposed(
    d_out: Array, weights: tuple[Array, ...], group_sizes: Array, offset: Array | int = 0
) -> Array:
    """The gradient for rows that were multiplied by several weights: (M, sum of Y), each (S,X,Y) -> (M,X)."""
    return matmul(d_out, jnp.concatenate([weight[offset] for weight in weights], axis=1), transpose_b=True)


def weight_gradients(
    rows: Array, d_out: Array, group_sizes: Array, totals: tuple[Array, ...], offset: Array | int = 0
) -> tuple[Array, ...]:
    """The gradients for the weights by which the rows were multiplied, written into `totals` at `offset`.

    (M,X), (M, sum of Y), each (S,X,Y).
    """
    gradient = matmul(rows, d_out, jnp.float32, transpose_a=True)
    parts = jnp.split(gradient.astype(totals[0].dtype), len(totals), axis=1)
    return tuple(
        jax.lax.dynamic_update_index_in_dim(total, part, offset, axis=0)
        for total, part in zip(totals, parts, strict=True)
    )
