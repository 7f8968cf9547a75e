"""The experts' SwiGLU on rows sorted by expert, each times its weight, with an explicit gradient. No row is dropped.

It is made of grouped products (`grouped_loop`, `grouped_triton`), which autodiff cannot differentiate. A row's weight,
the gate of its expert, multiplies before the last product: so its gradient does not need the experts' outputs. The
backward pass keeps the two pre-activations (2*M*F numbers), which saves a quarter of its products, and recomputes the
rest.

    M rows, sorted by expert    D hidden    F expert hidden    E experts
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array

Weights = tuple[Array, Array, Array]
"""The masters of gate, up (E,D,F) and down (E,F,D)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn(grouped: ModuleType, rows: Array, row_weights: Array, weights: Weights, group_sizes: Array) -> Array:
    """`(w * silu(rows @ gate[e]) * (rows @ up[e])) @ down[e]`, for each row the e of its group and its weight w.

    Args:
        grouped: the grouped products, `Kernels.grouped`.
        rows: (M, D), sorted by expert, in the compute dtype.
        row_weights: (M,), in float32 or wider.
        weights: they are cast to the compute dtype expert by expert.
        group_sizes: (E,) int, rows of each expert. Rows after the last group have undefined results and gradients.

    Returns (M, D). The weights' gradients accumulate in float32 (or wider) and are returned in the masters' dtype.
    """
    return _forward(grouped, rows, row_weights, weights, group_sizes)[0]


def expert_ffn_of_stack(
    grouped: ModuleType, rows: Array, row_weights: Array, weights: Weights, group_sizes: Array, offset: Array
) -> Array:
    """`expert_ffn` by the E experts that begin at `offset` in a longer stack. It has no gradient.

    For decoding, where copying a layer's experts costs more than using two of them: the loops read them in place
    (Triton's products still copy the layer's part).
    """
    return _products(grouped, rows, row_weights, weights, group_sizes, offset)[0]


def _products(
    grouped: ModuleType, rows: Array, row_weights: Array, weights: Weights, group_sizes: Array, offset: Array | int
) -> tuple[Array, Array]:
    gate, up, down = weights
    x, row_weights = _pad(grouped, rows), _pad(grouped, row_weights[:, None])
    gate_up, h = grouped.grouped_swiglu(x, row_weights, gate, up, group_sizes, offset)  # (M,2F), (M,F) and padding
    return grouped.grouped_matmul(h, (down,), group_sizes, offset)[: rows.shape[0]], gate_up


def _forward(grouped: ModuleType, rows: Array, row_weights: Array, weights: Weights, group_sizes: Array):
    out, gate_up = _products(grouped, rows, row_weights, weights, group_sizes, offset=0)
    return out, (rows, row_weights, weights, group_sizes, gate_up)


def _backward(grouped: ModuleType, saved: tuple, d_out: Array) -> tuple:
    rows, row_weights, weights, group_sizes, gate_up = saved
    gate, up, down = weights
    x, d_y, padded = _pad(grouped, rows), _pad(grouped, d_out), _pad(grouped, row_weights[:, None])
    h, d_gate_up, d_row_weights = grouped.grouped_swiglu_gradients(d_y, padded, gate_up, down, group_sizes)
    d_rows = grouped.grouped_matmul_transposed(d_gate_up, (gate, up), group_sizes)
    of_gate_and_up = grouped.weight_gradients(x, d_gate_up, group_sizes, parts=2)
    of_down = grouped.weight_gradients(h, d_y, group_sizes, parts=1)
    masters = zip((*of_gate_and_up, *of_down), weights, strict=True)
    d_weights = tuple(gradient.astype(master.dtype) for gradient, master in masters)
    M = rows.shape[0]
    return d_rows[:M], d_row_weights[:M].astype(row_weights.dtype), d_weights, None


expert_ffn.defvjp(_forward, _backward)


def _pad(grouped: ModuleType, rows: Array) -> Array:
    return jnp.pad(rows, ((0, grouped.padding(rows.shape[0])), (0, 0)))
