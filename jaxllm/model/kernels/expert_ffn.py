"""The experts' SwiGLU on rows sorted by expert, each times its weight, with an explicit gradient. No row is dropped.

It is made of grouped products (`grouped_loop`, `grouped_triton`), which autodiff cannot differentiate. A row's weight,
the gate of its expert, multiplies before the last product: so the weight's gradient needs no output of an expert, which
nobody keeps. The backward pass keeps the two pre-activations (2*M*F numbers), which saves a quarter of its products,
and recomputes the rest.

    M rows, sorted by expert    D hidden    F expert hidden    E experts
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn(
    grouped: ModuleType, rows: Array, row_weights: Array, gate: Array, up: Array, down: Array, group_sizes: Array
) -> Array:
    """`(w * silu(rows @ gate[e]) * (rows @ up[e])) @ down[e]`, for each row the e of its group and its weight w.

    Args:
        grouped: the grouped products, `Kernels.grouped`.
        rows: (M, D), sorted by expert, in the compute dtype.
        row_weights: (M,), in float32 or wider.
        gate, up: (E, D, F) masters; they are cast to the compute dtype expert by expert.
        down: (E, F, D), likewise.
        group_sizes: (E,) int, rows of each expert. Rows after the last group have undefined results and gradients.

    Returns (M, D). The weights' gradients accumulate in float32 (or wider) and are returned in the masters' dtype.
    """
    return _forward(grouped, rows, row_weights, gate, up, down, group_sizes)[0]


def expert_ffn_of_stack(
    grouped: ModuleType,
    rows: Array,
    row_weights: Array,
    gate: Array,
    up: Array,
    down: Array,
    group_sizes: Array,
    offset: Array,
) -> Array:
    """`expert_ffn` by the E experts that begin at `offset` in a longer stack. It has no gradient.

    For decoding, where copying a layer's experts costs more than using two of them: the loops read them in place
    (Triton's products still copy the layer's part).
    """
    return _products(grouped, rows, row_weights, gate, up, down, group_sizes, offset)[0]


def _products(
    grouped: ModuleType,
    rows: Array,
    row_weights: Array,
    gate: Array,
    up: Array,
    down: Array,
    group_sizes: Array,
    offset: Array | int,
) -> tuple[Array, Array]:
    x, weight = _pad(grouped, rows), _pad(grouped, row_weights[:, None])
    gate_up, h = grouped.grouped_swiglu(x, weight, gate, up, group_sizes, offset)  # (M,2F), (M,F) and padding
    return grouped.grouped_matmul(h, (down,), group_sizes, offset)[: rows.shape[0]], gate_up


def _forward(
    grouped: ModuleType, rows: Array, row_weights: Array, gate: Array, up: Array, down: Array, group_sizes: Array
):
    out, gate_up = _products(grouped, rows, row_weights, gate, up, down, group_sizes, offset=0)
    return out, (rows, row_weights, gate, up, down, group_sizes, gate_up)


def _backward(grouped: ModuleType, saved: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, row_weights, gate, up, down, group_sizes, gate_up = saved
    x, d_y, weight = _pad(grouped, rows), _pad(grouped, d_out), _pad(grouped, row_weights[:, None])
    h, d_gate_up, d_weights = grouped.grouped_swiglu_gradients(d_y, weight, gate_up, down, group_sizes)
    d_rows = grouped.grouped_matmul_transposed(d_gate_up, (gate, up), group_sizes)
    d_gate, d_up = grouped.weight_gradients(x, d_gate_up, group_sizes, parts=2)
    (d_down,) = grouped.weight_gradients(h, d_y, group_sizes, parts=1)
    M = rows.shape[0]
    return (
        d_rows[:M],
        d_weights[:M].astype(row_weights.dtype),
        d_gate.astype(gate.dtype),
        d_up.astype(up.dtype),
        d_down.astype(down.dtype),
        None,
    )


expert_ffn.defvjp(_forward, _backward)


def _pad(grouped: ModuleType, rows: Array) -> Array:
    return jnp.pad(rows, ((0, grouped.padding(rows.shape[0])), (0, 0)))
