"""Frozen experts with adapters on an NVIDIA GPU: the grouped products of `grouped_triton`, with those of A and B.

SwiGLU lies between two sums of products, so it is not in a kernel, and rows are gathered once. The kernels multiply
ranks that are multiples of 16: others are filled up with zeros.

    M rows, sorted by group    E groups    S experts of a stack    X in    Y out    r rank
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels import grouped_triton
from jaxllm.model.kernels.grouped_triton import grouped_matmul, grouped_matmul_transposed, weight_gradients
from jaxllm.model.kernels.interface import Adapter, Adapters, ExpertRows, Gradients, Saved
from jaxllm.model.kernels.matmul import in_dtype
from jaxllm.model.kernels.swiglu import swiglu, swiglu_gradients

RANKS = 16
"""The least rank of a product."""


def ffn(rows: ExpertRows, saved: Saved | None) -> tuple[Array, Array | None]:
    """`ExpertKernels.ffn` of experts with adapters."""
    x, (for_gate, for_up, for_down) = _gathered(rows.x, rows), _prepared(rows)
    gate, up, down = rows.weights
    g, u = (_product(x, weight, adapter, rows) for weight, adapter in ((gate, for_gate), (up, for_up)))
    h = swiglu(g, u, rows.row_weights).astype(x.dtype)
    written = None
    if saved is not None:
        products = jnp.concatenate([g, u], axis=1)
        written = jax.lax.dynamic_update_index_in_dim(saved.rows, products, saved.layer, axis=0)
    return _product(h, down, for_down, rows), written


def ffn_gradients(
    rows: ExpertRows, d_out: Array, saved: Saved | None, totals: Gradients
) -> tuple[Array, Array, Gradients]:
    """`ExpertKernels.ffn_gradients` of experts with adapters, from what `ffn` saved."""
    if saved is None:
        raise ValueError("the Triton kernels need what the forward pass saved: they have no backward pass without it")
    x, d_y = _gathered(rows.x, rows), _gathered(d_out, rows)
    prepared = (for_gate, for_up, for_down) = _prepared(rows)
    g, u = jnp.split(jax.lax.dynamic_index_in_dim(saved.rows, saved.layer, keepdims=False), 2, axis=1)
    d_h, d_low_down = _transposed(d_y, rows.weights[2:], (for_down,), rows)
    h, d_gate, d_up, d_row_weights = swiglu_gradients(g, u, rows.row_weights, d_h)
    h, d_gate, d_up = (array.astype(x.dtype) for array in (h, d_gate, d_up))
    d_gate_up = jnp.concatenate([d_gate, d_up], axis=1)
    d_rows, d_low_gate_up = _transposed(d_gate_up, rows.weights[:2], (for_gate, for_up), rows)
    operands = ((x, d_gate), (x, d_up), (h, d_y))

    def gradients(inputs: Array, d: Array, d_low: Array, adapter: Adapter, total: Adapter) -> Adapter:
        low, (rank, dtype) = grouped_matmul(inputs, adapter[0], rows.group_sizes), (total[0].shape[2], total[0].dtype)
        (d_a,), (d_b,) = (
            weight_gradients((left, None), (right, None), rows.group_sizes, (jax.lax.empty(factor.shape, dtype),))
            for left, right, factor in zip((inputs, low), (d_low, d), adapter, strict=True)
        )
        return d_a[:, :, :rank], d_b[:, :rank]

    d_lows = (*d_low_gate_up, *d_low_down)
    gate, up, down = (
        gradients(*two, d_low, adapter, total)
        for two, d_low, adapter, total in zip(operands, d_lows, prepared, totals, strict=True)
    )
    return d_rows, d_row_weights[:, None], (gate, up, down)


def _gathered(x: Array, rows: ExpertRows) -> Array:  # (N,D) -> (M,D)
    return x if rows.tokens is None else x[rows.tokens]


def _prepared(rows: ExpertRows) -> Adapters:
    """A and B in the compute dtype, of a rank that the kernels multiply."""
    if rows.adapters is None:
        raise ValueError("these kernels are for experts with adapters: use those of grouped_triton")

    def padded(adapter: Adapter) -> Adapter:
        a, b = (in_dtype(factor, rows.x.dtype) for factor in adapter)
        more = -a.shape[2] % RANKS
        return jnp.pad(a, ((0, 0), (0, 0), (0, more))), jnp.pad(b, ((0, 0), (0, more), (0, 0)))

    gate, up, down = map(padded, rows.adapters)
    return gate, up, down


def _product(x: Array, weight: Array, adapter: Adapter, rows: ExpertRows) -> Array:
    """`x @ (weight + a @ b)` of each row's expert: (M,X), (S,X,Y), (E,X,r) and (E,r,Y) -> (M,Y)."""
    a, b = adapter
    low = grouped_matmul(grouped_matmul(x, a, rows.group_sizes), b, rows.group_sizes)
    return grouped_matmul(x, weight, rows.group_sizes, rows.offset) + low


def _transposed(
    d: Array, weights: tuple[Array, ...], adapters: tuple[Adapter, ...], rows: ExpertRows
) -> tuple[Array, list[Array]]:
    """The gradient for rows that were multiplied by several weights, (M, sum of Y) -> (M,X); and for each `x @ a`."""
    total = grouped_matmul_transposed(d, weights, rows.group_sizes, rows.offset)
    parts = jnp.split(d, len(adapters), axis=1)
    lows = []
    for part, (a, b) in zip(parts, adapters, strict=True):
        lows.append(grouped_matmul_transposed(part, (b,), rows.group_sizes))
        total += grouped_matmul_transposed(lows[-1], (a,), rows.group_sizes)
    return total, lows


KERNELS = dataclasses.replace(grouped_triton.KERNELS, ffn=ffn, ffn_gradients=ffn_gradients)
