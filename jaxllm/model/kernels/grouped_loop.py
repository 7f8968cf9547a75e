"""The experts' two passes (`ExpertKernels`) for any device: loops over the groups that have rows, sorted by group.

A group is computed in one block of the smallest size that holds it. So in each pass its weights are read once and its
weight gradients are written once, and intermediate results are of one block only. Only a group above the largest size
needs several blocks. The loops' trip counts are dynamic: an empty group costs only the zeros of its gradient. On a GPU
each such loop would wait for the host.

    P rows, the last padding(M) of them padding    E groups, each of an expert    S experts of a stack    L layers
    D hidden    F expert hidden    X in    Y out
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.kernels.interface import Adapter, Adapters, ExpertKernels, ExpertRows, Gradients, Saved, Weights
from jaxllm.model.kernels.matmul import FEW_ROWS, cast, in_dtype, matmul
from jaxllm.model.kernels.packed import pack, read, unpack
from jaxllm.model.kernels.swiglu import swiglu, swiglu_gradients

# A size more makes every program longer to compile (it is a loop in each pass); a size less pads more.
BLOCK_ROWS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Sizes for any group. Most groups have about an even share of the rows: `_sizes_near` has more sizes there."""

SMALL_GROUP = 8
"""Groups of less than this part of an even share are rare: they are padded to it, and need no sizes of their own."""


def block_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """The sizes that blocks can have, of this many rows in all; the last holds any group, or is the very largest."""
    few = rows <= FEW_ROWS  # a weight is used for a row or two: small blocks
    menu = (1, 2, 4, 8, *BLOCK_ROWS) if few else BLOCK_ROWS
    smallest = 1
    if not (few or is_symbolic_dim(rows)):
        smallest = min(rows // (SMALL_GROUP * groups), BLOCK_ROWS[-1] // SMALL_GROUP)
        menu = tuple(sorted({*menu, *_sizes_near(_without_padding(rows) // groups)}))
    return tuple(size for size in menu if smallest <= size <= rows) or menu[:1]


def _sizes_near(share: int) -> range:
    """Sizes from about 0.85 to 1.25 of an even share, a twelfth to a sixth of it apart, or 16 if that is more."""
    power = 1 << max(share.bit_length() - 1, 0)  # the largest power of two in it
    step = max(16, power // 8 if 2 * share < 3 * power else power // 4)
    first, last = (-(-share * part // (100 * step)) * step for part in (85, 125))
    return range(max(first, step), min(last, BLOCK_ROWS[-1]) + 1, step)


def padding(most_rows: int) -> int:
    """Rows of padding after the last group: its block may extend beyond it, and a slice must not be shifted back."""
    if is_symbolic_dim(most_rows):  # in jax.export: enough for blocks of every size
        return BLOCK_ROWS[-1]
    sizes = (0, 1, 2, 4, 8, *BLOCK_ROWS)
    return max(size - smaller for smaller, size in itertools.pairwise(sizes) if smaller < most_rows)


def _without_padding(rows: int) -> int:
    """The inverse of `m + padding(m)`."""
    return next((rows - added for added in range(rows) if padding(rows - added) == added), rows)


def prepared(weight: Array, dtype: jnp.dtype) -> Array:
    """A stack of weights as the products read it: the masters, of which each group's part is cast."""
    return weight


def new_saved(layers: int, most_rows: int, features: int, dtype: jnp.dtype) -> Array:
    """Zeros; the padding of the rows is saved too."""
    return jnp.zeros((layers, most_rows + padding(most_rows), features), dtype)


def new_gradient(weight: Array) -> Array:
    """Zeros, which `ffn_gradients` leaves where a group is empty."""
    return jnp.zeros_like(weight)


def ffn(rows: ExpertRows, saved: Saved | None) -> tuple[Array, Array | None]:
    """`ExpertKernels.ffn`."""
    x, tokens, row_weights, group_sizes, weights, offset = _sorted(rows)
    (P,), D, dtype = tokens.shape, x.shape[1], x.dtype
    gate_up, down = weights[:2], weights[2:]
    sizes, packed = block_sizes(P, group_sizes.shape[0]), pack(x)

    def group(e: Array, start: Array, end: Array, carry: Any) -> Any:
        if P > FEW_ROWS:  # one product with gate and up is faster than two, and worth a copy of them
            gate_up_copy, down_copy = (_side_by_side(some, offset + e, dtype) for some in (gate_up, down))
        else:  # sliced in the block, a weight is read in place
            gate_up_copy, down_copy = None, None
        low_rank = _of_group(rows.adapters, e, dtype)

        def block(size: int, e: Array, at: Array, stop: Array, is_first: bool, carry: Any) -> Any:
            out, stack = carry
            x_rows = _gather(packed, tokens, at, size)
            products = _multiply(x_rows, gate_up, offset + e, gate_up_copy)
            if low_rank is not None:
                products = _sum(products, jnp.concatenate([_low_rank(x_rows, low_rank[i]) for i in (0, 1)], axis=1))
            g, u = jnp.split(products, 2, axis=1)
            h = swiglu(g, u, _slice(row_weights, at, size)).astype(dtype)
            y = _multiply(h, down, offset + e, down_copy)
            if low_rank is not None:
                y = _sum(y, _low_rank(h, low_rank[2]))
            # A block may extend into the next one, which is computed later and overwrites the surplus.
            out = _write(out, y, at)
            return out, None if saved is None else _write(stack, products, saved.layer * P + at)

        return _loop_blocks(sizes, e, start, end, block, carry)

    out, stack = _loop_groups(group_sizes, group, (pack(jnp.zeros((P, D), dtype)), _packed_rows(saved)))
    return unpack(out), None if saved is None else unpack(stack.reshape(saved.rows.shape))


def ffn_gradients(
    rows: ExpertRows, d_out: Array, saved: Saved | None, totals: Gradients
) -> tuple[Array, Array, Gradients]:
    """`ExpertKernels.ffn_gradients`. The E experts' part of `totals` must be zero: that of an empty group stays."""
    x, tokens, row_weights, group_sizes, weights, offset = _sorted(rows)
    (P,), D, dtype, acc_dtype = tokens.shape, x.shape[1], x.dtype, at_least_float32(x.dtype)
    sizes, packed_x, packed_d_out = block_sizes(P, group_sizes.shape[0]), pack(x), pack(d_out)
    stack, adapters = _packed_rows(saved), rows.adapters
    totals, tree = jax.tree.flatten(totals)
    first = 0 if adapters else offset  # adapters are those of the E experts

    def group(e: Array, start: Array, end: Array, carry: Any) -> Any:
        gate_up, down = (_side_by_side(some, offset + e, dtype) for some in (weights[:2], weights[2:]))
        low_rank = _of_group(adapters, e, dtype)

        def block(size: int, e: Array, at: Array, stop: Array, is_first: bool, carry: Any) -> Any:
            d_rows, d_row_weights, totals = carry
            x_rows, w = _gather(packed_x, tokens, at, size), _slice(row_weights, at, size)
            in_group = (at + jnp.arange(size) < stop)[:, None]  # not the next block's
            d_y = jnp.where(in_group, _gather(packed_d_out, tokens, at, size), 0)
            d_h = matmul(d_y, down, transpose_b=True)
            if low_rank is not None:
                d_h = _sum(d_h, _low_rank_transposed(d_y, low_rank[2]))
            if saved is not None:
                products = _slice(stack, saved.layer * P + at, size)
            else:
                products = matmul(x_rows, gate_up)
                if low_rank is not None:
                    products = _sum(products, jnp.concatenate([_low_rank(x_rows, low_rank[i]) for i in (0, 1)], axis=1))
            g, u = jnp.split(products, 2, axis=1)
            h, d_gate, d_up, d_w = swiglu_gradients(g, u, w, d_h)
            d_gate_up = jnp.concatenate([d_gate, d_up], axis=1).astype(dtype)
            d_x = matmul(d_gate_up, gate_up, transpose_b=True)
            d_weights: Sequence[Array] = ()
            if low_rank is not None:
                d_gate, d_up = d_gate.astype(dtype), d_up.astype(dtype)
                d_x = _sum(d_x, _low_rank_transposed(d_gate, low_rank[0]) + _low_rank_transposed(d_up, low_rank[1]))
                operands = ((x_rows, d_gate), (x_rows, d_up), (h.astype(dtype), d_y))
                pairs = (_factor_gradients(*two, pair) for two, pair in zip(operands, low_rank, strict=True))
                d_weights = [factor for pair in pairs for factor in pair]
            elif totals:
                d_weights = (
                    *jnp.split(matmul(x_rows, d_gate_up, acc_dtype, transpose_a=True), 2, axis=1),
                    matmul(h.astype(dtype), d_y, acc_dtype, transpose_a=True),
                )
            d_rows = _write(d_rows, d_x, at)
            d_row_weights = _write(d_row_weights, d_w[:, None].astype(row_weights.dtype), at)
            if not is_first:
                d_weights = [part + total[first + e] for part, total in zip(d_weights, totals, strict=True)]
            parts = (part[None].astype(total.dtype) for total, part in zip(totals, d_weights, strict=True))
            totals = tuple(_write(total, part, first + e) for total, part in zip(totals, parts, strict=True))
            return d_rows, d_row_weights, totals

        return _loop_blocks(sizes, e, start, end, block, carry)

    carry = pack(jnp.zeros((P, D), dtype)), jnp.zeros_like(row_weights), tuple(totals)
    d_rows, d_row_weights, totals = _loop_groups(group_sizes, group, carry)
    return unpack(d_rows), d_row_weights, tree.unflatten(totals)


def _of_group(adapters: Adapters | None, e: Array, dtype: jnp.dtype) -> list[Adapter] | None:
    """A and B of a group's matrices, in the compute dtype."""
    if adapters is None:
        return None
    return [(in_dtype(read(a, e), dtype), in_dtype(read(b, e), dtype)) for a, b in adapters]


def _low_rank(x: Array, adapter: Adapter) -> Array:  # (b,X) -> (b,Y), in float32 or wider
    a, b = adapter
    return matmul(matmul(x, a), b, at_least_float32(x.dtype))


def _low_rank_transposed(d: Array, adapter: Adapter) -> Array:  # (b,Y) -> (b,X), in float32 or wider
    a, b = adapter
    return matmul(matmul(d, b, transpose_b=True), a, at_least_float32(d.dtype), transpose_b=True)


def _factor_gradients(x: Array, d: Array, adapter: Adapter) -> tuple[Array, Array]:
    """Of A and B, from the rows and their products' gradients: (b,X), (b,Y) -> (X,r), (r,Y)."""
    (a, b), acc_dtype = adapter, at_least_float32(x.dtype)
    d_a = matmul(x, matmul(d, b, transpose_b=True), acc_dtype, transpose_a=True)
    return d_a, matmul(matmul(x, a), d, acc_dtype, transpose_a=True)


def _sum(product: Array, added: Array) -> Array:
    return (product.astype(added.dtype) + added).astype(product.dtype)


def _sorted(rows: ExpertRows) -> tuple[Array, Array, Array, Array, Weights, Array | int]:
    x, tokens, row_weights, group_sizes, weights, offset, _ = rows
    return x, jnp.arange(x.shape[0]) if tokens is None else tokens, row_weights, group_sizes, weights, offset


def _packed_rows(saved: Saved | None) -> Any:  # (L,P,2F) -> (L*P,2F)
    return None if saved is None else pack(saved.rows).reshape(-1, saved.rows.shape[-1])


def _slice(packed: Array, start: Array, size: int) -> Array:
    return unpack(jax.lax.dynamic_slice_in_dim(packed, start, size))


def _gather(packed: Array, tokens: Array, start: Array, size: int) -> Array:
    """The tokens of some rows, (N,D) -> (size,D)."""
    return unpack(packed.at[_slice(tokens, start, size)].get(mode="promise_in_bounds"))


def _multiply(x: Array, weights: Sequence[Array], e: Array, copy: Array | None) -> Array:
    """`x` times several weights of a group, side by side, of which there may be a copy."""
    if copy is not None:
        return matmul(x, copy)
    return jnp.concatenate([matmul(x, in_dtype(read(weight, e), x.dtype)) for weight in weights], axis=1)


def _loop_groups(group_sizes: Array, group: Callable[..., Any], carry: Any) -> Any:
    """Fold `group(e, start, end, carry)` over the groups that have rows."""
    ends = jnp.cumsum(group_sizes)

    def one(e: Array, carry: Any) -> Any:
        end, size = ends[e], group_sizes[e]
        return _once_if(size > 0, lambda zero, carry: group(e + zero, end - size, end, carry), carry)

    return jax.lax.fori_loop(0, group_sizes.shape[0], one, carry)


def _loop_blocks(
    sizes: tuple[int, ...], e: Array, start: Array, end: Array, block: Callable[..., Any], carry: Any
) -> Any:
    """Fold `block(size, e, start, end, whether it is the first, carry)` over the blocks of a group e that has rows.

    The first block holds the remainder and may extend beyond it; the others are full, of the largest size.
    """
    largest = sizes[-1]
    remainder = (end - start - 1) % largest + 1
    stop, smaller = start + remainder, 0
    for size in sizes:
        fits = (smaller < remainder) & (remainder <= size)
        carry = _once_if(
            fits, lambda zero, carry, size=size: block(size, e + zero, start + zero, stop, True, carry), carry
        )
        smaller = size
    if largest < BLOCK_ROWS[-1]:
        return carry

    def full(i: Array, carry: Any) -> Any:
        at = stop + i * largest
        return block(largest, e, at, at + largest, False, carry)

    return jax.lax.fori_loop(0, (end - stop) // largest, full, carry)


def _once_if(condition: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """`body(0, carry)` or nothing. A loop, where `cond` would copy the carry.

    XLA hoists what does not depend on the loop's counter, even if the loop does not run: adding the zero avoids it.
    """
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), body, carry)


def _side_by_side(weights: Sequence[Array], e: Array, dtype: jnp.dtype) -> Array:
    """Several weights of one group as one (X, sum of Y); a dynamic slice copies them anyway.

    Joined as bits: XLA's CPU before JAX 0.12 would join bfloat16 in float32, and convert it twice.
    """
    return unpack(jnp.concatenate([pack(cast(read(weight, e), dtype)) for weight in weights], axis=1))


def _write(target: Array, value: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(target, pack(value), start, axis=0)


KERNELS = ExpertKernels(ffn, ffn_gradients, padding, prepared, new_saved, new_gradient)
