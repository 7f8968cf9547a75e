"""The routed experts' SwiGLU on rows sorted by expert: no row is dropped, and the cost follows the rows that are there.

`jax.lax.ragged_dot` could do the three products, but XLA lowers it on the CPU, and on an H100, to a product of every
row with every expert: E times the work. Here each expert's rows are walked in blocks by loops with a dynamic trip
count, large blocks first and small ones for the remainder, so that little is padded. A block goes through all three
products while it is in cache. JAX cannot differentiate such loops in reverse, hence the rule written out below.

    M rows, sorted by expert    D hidden    F expert hidden    E experts    b rows of a block
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# Rows of a block, largest first. (256, 32) was among the fastest of those tried on two AVX-512 cores: large blocks keep
# the matrix units busy, and a remainder is padded by at most 31 rows. Keeping the two pre-activations for the backward
# pass (2*M*F numbers) saves a quarter of its products.
BLOCK_ROWS = (256, 32)

_KEEP = ((1,), (0,))  # (b,x) @ (x,y)
_TRANSPOSE_RIGHT = ((1,), (1,))  # (b,y) @ (x,y)^T
_TRANSPOSE_LEFT = ((0,), (0,))  # (b,x)^T @ (b,y)


@jax.custom_vjp
def expert_ffn(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array) -> Array:
    """`(silu(rows @ gate[e]) * (rows @ up[e])) @ down[e]`, for each row the e of its group.

    Args:
        rows: (M, D), sorted by expert.
        gate, up: (E, D, F), in the dtype of `rows`.
        down: (E, F, D), likewise.
        group_sizes: (E,) int, rows of each expert; their sum is M.

    Returns:
        (M, D). Gradients accumulate in float32 (or wider) and come back in the dtype of `rows`.
    """
    return _walk_forward(rows, gate, up, down, group_sizes, keep=False)[0]


def _forward(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array):
    out, *pre_activations = _walk_forward(rows, gate, up, down, group_sizes, keep=True)
    return out, (rows, gate, up, down, group_sizes, *pre_activations)


def _walk_forward(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, *, keep: bool) -> list[Array]:
    """The output and, with `keep`, the padded pre-activations of gate and up."""
    (M, D), (E, _, F) = rows.shape, gate.shape
    padded = _pad(rows)

    def expert(e: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        own_gate, own_up, own_down = gate[e], up[e], down[e]

        def block(size: int, start: Array, end: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
            x = _rows(padded, start, size)
            g, u = _dot(x, own_gate, _KEEP), _dot(x, own_up, _KEEP)  # (b,F)
            y = _dot(jax.nn.silu(g) * u, own_down, _KEEP)  # (b,D)
            # The last block of a group may run into the next one: that group, walked later, overwrites the surplus.
            return tuple(_write(out, value, start) for out, value in zip(outs, (y, g, u), strict=False))

        return _walk_blocks(M, group_sizes, e, block, outs)

    widths = (D, F, F) if keep else (D,)
    outs = tuple(jnp.zeros((padded.shape[0], width), rows.dtype) for width in widths)
    out, *pre_activations = jax.lax.fori_loop(0, E, expert, outs)
    return [out[:M], *pre_activations]


def _backward(saved: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, gate, up, down, group_sizes, gate_pre, up_pre = saved
    (M, D), (E, _, F) = rows.shape, gate.shape
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    padded, d_padded = _pad(rows), _pad(d_out)

    def expert(e: Array, grads: tuple[Array, ...]) -> tuple[Array, ...]:
        own_gate, own_up, own_down = gate[e], up[e], down[e]

        def block(size: int, start: Array, end: Array, grads: tuple[Array, ...]) -> tuple[Array, ...]:
            d_rows, d_gate, d_up, d_down = grads
            own = (start + jnp.arange(size) < end)[:, None]  # the block's rows that are not the next group's
            x, g, u = (_rows(source, start, size) for source in (padded, gate_pre, up_pre))
            d_y = jnp.where(own, _rows(d_padded, start, size), 0)
            d_h = _dot(d_y, own_down, _TRANSPOSE_RIGHT)  # (b,F)
            sigmoid = jax.nn.sigmoid(g)
            gated = g * sigmoid
            d_g, d_u = d_h * u * (sigmoid + gated * (1 - sigmoid)), d_h * gated
            d_x = _dot(d_g, own_gate, _TRANSPOSE_RIGHT) + _dot(d_u, own_up, _TRANSPOSE_RIGHT)
            return (
                _write(d_rows, d_x, start),
                d_gate + _dot(x, d_g, _TRANSPOSE_LEFT, wide),
                d_up + _dot(x, d_u, _TRANSPOSE_LEFT, wide),
                d_down + _dot(gated * u, d_y, _TRANSPOSE_LEFT, wide),
            )

        zeros = (jnp.zeros((D, F), wide), jnp.zeros((D, F), wide), jnp.zeros((F, D), wide))
        d_rows, *d_weights = _walk_blocks(M, group_sizes, e, block, (grads[0], *zeros))
        return d_rows, *(_write(all_e, own[None], e) for all_e, own in zip(grads[1:], d_weights, strict=True))

    grads = (jnp.zeros_like(padded), *(jnp.zeros(weight.shape, rows.dtype) for weight in (gate, up, down)))
    d_rows, d_gate, d_up, d_down = jax.lax.fori_loop(0, E, expert, grads)
    return d_rows[:M], d_gate, d_up, d_down, None


expert_ffn.defvjp(_forward, _backward)


def _walk_blocks(most_rows: int, group_sizes: Array, e: Array, block: Callable[..., Any], carry: Any) -> Any:
    """Fold `block(size, start, end, carry)` over the blocks of group e, which has `most_rows` at most."""
    end = jnp.cumsum(group_sizes)[e]
    start = end - group_sizes[e]
    for size in BLOCK_ROWS:
        if size > max(most_rows, BLOCK_ROWS[-1]):
            continue
        surplus = size - 1 if size == BLOCK_ROWS[-1] else 0
        count = (end - start + surplus) // size
        carry = jax.lax.fori_loop(0, count, functools.partial(_one_block, block, size, start, end), carry)
        start += count * size
    return carry


def _one_block(block: Callable[..., Any], size: int, start: Array, end: Array, i: Array, carry: Any) -> Any:
    return block(size, start + i * size, end, carry)


def _dot(left: Array, right: Array, contract: tuple, dtype: jnp.dtype | None = None) -> Array:
    return jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=dtype)


def _rows(source: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(source, start, size)


def _write(target: Array, value: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(target, value.astype(target.dtype), start, axis=0)


def _pad(rows: Array) -> Array:
    """Room for the last block to run over, so that a slice never has to be shifted back into the array."""
    return jnp.pad(rows, ((0, BLOCK_ROWS[-1]), (0, 0)))
