"""The experts' SwiGLU on rows sorted by expert, with an explicit gradient. No row is dropped.

It uses three grouped products (`grouped_loop`, `grouped_triton`), which autodiff cannot differentiate. The backward
pass keeps the two pre-activations (2*M*F numbers), which saves a quarter of its products, and recomputes the rest.

    M rows, sorted by expert    D hidden    F expert hidden    E experts
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, at_least_float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn(grouped: ModuleType, rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array) -> Array:
    """`(silu(rows @ gate[e]) * (rows @ up[e])) @ down[e]`, for each row the e of its group.

    Args:
        grouped: the grouped products, `Kernels.grouped`.
        rows: (M, D), sorted by expert, in the compute dtype.
        gate, up: (E, D, F) masters; they are cast to the compute dtype expert by expert.
        down: (E, F, D), likewise.
        group_sizes: (E,) int, rows of each expert. Rows after the last group have undefined results and gradients.

    Returns (M, D). The weights' gradients accumulate in float32 (or wider) and are returned in the masters' dtype.
    """
    return _forward(grouped, rows, gate, up, down, group_sizes)[0]


def expert_ffn_of_stack(
    grouped: ModuleType, rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, offset: Array
) -> Array:
    """`expert_ffn` by the E experts that begin at `offset` in a longer stack. It has no gradient.

    For decoding, where copying a layer's experts costs more than using two of them: the loops read them in place
    (Triton's products still copy the layer's part).
    """
    return _products(grouped, rows, gate, up, down, group_sizes, offset)[0]


def _products(grouped: ModuleType, rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, offset):
    gate_up = grouped.grouped_matmul(_pad(grouped, rows), (gate, up), group_sizes, offset)  # (M,2F) and padding
    out = grouped.grouped_matmul(_swiglu(gate_up), (down,), group_sizes, offset)
    return out[: rows.shape[0]], gate_up


def _swiglu(gate_up: Array) -> Array:  # (M,2F) -> (M,F)
    g, u = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(g) * u


def _forward(grouped: ModuleType, rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array):
    out, gate_up = _products(grouped, rows, gate, up, down, group_sizes, offset=0)
    return out, (rows, gate, up, down, group_sizes, gate_up)


def _backward(grouped: ModuleType, saved: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, gate, up, down, group_sizes, gate_up = saved
    x, d_y = _pad(grouped, rows), _pad(grouped, d_out)
    acc_dtype = at_least_float32(rows.dtype)
    d_h = grouped.grouped_matmul_transposed(d_y, (down,), group_sizes).astype(acc_dtype)  # (M,F)
    g, u = jnp.split(gate_up.astype(acc_dtype), 2, axis=-1)
    sigmoid = jax.nn.sigmoid(g)
    gated = g * sigmoid
    h = _swiglu(gate_up)  # as in the forward pass, so that a layer that is recomputed has one of them in memory
    d_gate_up = jnp.concatenate([d_h * u * (sigmoid + gated * (1 - sigmoid)), d_h * gated], axis=-1).astype(rows.dtype)
    d_rows = grouped.grouped_matmul_transposed(d_gate_up, (gate, up), group_sizes)[: rows.shape[0]]
    d_gate, d_up = grouped.weight_gradients(x, d_gate_up, group_sizes, parts=2)
    (d_down,) = grouped.weight_gradients(h, d_y, group_sizes, parts=1)
    return d_rows, d_gate.astype(gate.dtype), d_up.astype(up.dtype), d_down.astype(down.dtype), None


expert_ffn.defvjp(_forward, _backward)


def _pad(grouped: ModuleType, rows: Array) -> Array:
    return jnp.pad(rows, ((0, grouped.padding(rows.shape[0])), (0, 0)))
