"""The network of a single expert that every token goes through, on an NVIDIA GPU: a shared expert (`ExpertKernels`).

SwiGLU and its gradient are in the kernels of `grouped_triton`, with one group. The other products are XLA's own, which
are faster for one group.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels import grouped_triton
from jaxllm.model.kernels.interface import ExpertRows, Gradients, Saved
from jaxllm.model.kernels.matmul import matmul


def ffn(rows: ExpertRows, saved: Saved | None) -> tuple[Array, Array | None]:
    """`ExpertKernels.ffn` of one group, whose rows are the tokens."""
    written, h = grouped_triton.grouped_swiglu(rows, saved)
    return matmul(h, rows.weights[2][rows.offset]), written


def ffn_gradients(
    rows: ExpertRows, d_out: Array, saved: Saved | None, totals: Gradients
) -> tuple[Array, Array, Gradients]:
    """`ExpertKernels.ffn_gradients` of one group, from what `ffn` saved."""
    (gate, up, _), offset = rows.weights, rows.offset
    h, d_gate_up, d_row_weights = grouped_triton.grouped_swiglu_gradients(rows, d_out, saved)
    d_rows = matmul(d_gate_up, jnp.concatenate([gate[offset], up[offset]], axis=1), transpose_b=True)
    if not totals:  # frozen
        return d_rows, d_row_weights, totals
    d_gate, d_up = jnp.split(matmul(rows.x, d_gate_up, jnp.float32, transpose_a=True), 2, axis=1)  # (D,F)
    d_down = matmul(h, d_out, jnp.float32, transpose_a=True)  # (F,D)

    def write(total: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(total, part.astype(total.dtype), offset, axis=0)

    return d_rows, d_row_weights, (write(totals[0], d_gate), write(totals[1], d_up), write(totals[2], d_down))


KERNELS = dataclasses.replace(grouped_triton.KERNELS, ffn=ffn, ffn_gradients=ffn_gradients)
