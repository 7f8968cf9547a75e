"""The feed-forward network of a single expert that every row goes through, on an NVIDIA GPU: a shared expert.

SwiGLU and its gradient are in the kernels of `grouped_triton`, with one group. The other products are XLA's own, which
are faster for one group.

    M rows, all of them in the group, which are the tokens    S experts of a stack    D hidden    F expert hidden
"""

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels.grouped_triton import grouped_swiglu, grouped_swiglu_gradients
from jaxllm.model.kernels.matmul import matmul
from jaxllm.model.kernels.stacks import Kept, Weights


def ffn(
    x: Array,
    tokens: None,
    row_weights: Array,
    weights: Weights,
    group_sizes: Array,
    offset: Array | int = 0,
    kept: Kept | None = None,
) -> tuple[Array, Array | None]:
    """`grouped_triton.ffn` of one group, whose rows are the tokens."""
    gate, up, down = weights
    stack, h = grouped_swiglu(x, tokens, row_weights, gate, up, group_sizes, offset, kept)
    return matmul(h, down[offset]), stack


def ffn_gradients(
    x: Array,
    tokens: None,
    row_weights: Array,
    d_out: Array,
    weights: Weights,
    kept: Kept,
    group_sizes: Array,
    totals: Weights,
    offset: Array | int = 0,
) -> tuple[Array, Array, Weights]:
    """`grouped_triton.ffn_gradients` of one group."""
    gate, up, down = weights
    h, d_gate_up, d_row_weights = grouped_swiglu_gradients(d_out, tokens, row_weights, kept, down, group_sizes, offset)
    d_rows = matmul(d_gate_up, jnp.concatenate([gate[offset], up[offset]], axis=1), transpose_b=True)
    d_gate, d_up = jnp.split(matmul(x, d_gate_up, jnp.float32, transpose_a=True), 2, axis=1)  # (D,F)
    d_down = matmul(h, d_out, jnp.float32, transpose_a=True)  # (F,D)

    def write(total: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(total, part.astype(total.dtype), offset, axis=0)

    return d_rows, d_row_weights, (write(totals[0], d_gate), write(totals[1], d_up), write(totals[2], d_down))
