"""Grouped matrix products for any device: loops over the groups that have rows; the rows are sorted by group.

A group is computed in one block of the smallest size that holds it, so its weights are read once and its weight
gradient is written once. Only a group above the largest size needs several blocks. The loops' trip counts are dynamic:
an empty group costs only the zeros of its gradient. On a GPU each such loop would wait for the host.

    P rows, the last padding(M) of them padding    E groups    S groups of a stack    L layers    X in    Y out
    b rows of a block
    of an expert: D hidden    F expert hidden
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.kernels.matmul import cast, in_dtype, matmul
from jaxllm.model.kernels.packed import pack, packed_like, unpack
from jaxllm.model.kernels.stacks import Kept
from jaxllm.model.kernels.swiglu import swiglu, swiglu_gradients

# A size more makes every program longer to compile (it is a loop in each product); a size less pads more. Groups of 128
# to 512 rows are what a thousand tokens on seven experts give; decoding has groups of a row or a few.
BLOCK_ROWS = (16, 32, 48, 64, 96, 128, 192, 256, 288, 320, 384, 512, 768, 1024)
FEW_ROWS = 32
"""Up to this many rows in all, as in decoding, a weight is used for a row or two: small blocks, and no copy of it."""

SMALL_GROUP = 8
"""Groups of less than this part of an even share are rare: they are padded to it, and need no sizes of their own."""


def block_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """The sizes that blocks can have, of this many rows in all; the last holds any group, or is the very largest."""
    few = rows <= FEW_ROWS
    menu = (1, 2, 4, 8, *BLOCK_ROWS) if few else BLOCK_ROWS
    smallest = 1
    if not (few or is_symbolic_dim(rows)):
        smallest = min(rows // (SMALL_GROUP * groups), BLOCK_ROWS[-1] // SMALL_GROUP)
    return tuple(size for size in menu if smallest <= size <= rows) or menu[:1]


def padding(most_rows: int) -> int:
    """Rows of padding after the last group: its block may extend beyond it, and a slice must not be shifted back."""
    if is_symbolic_dim(most_rows):  # in jax.export: enough for blocks of every size
        return BLOCK_ROWS[-1]
    sizes = (0, 1, 2, 4, 8, *BLOCK_ROWS)
    return max(size - smaller for smaller, size in itertools.pairwise(sizes) if smaller < most_rows)


def prepared(weight: Array, dtype: jnp.dtype) -> Array:
    """A stack of weights as the products read it: the masters, of which each group's part is cast."""
    return weight


def new_kept(layers: int, most_rows: int, features: int, dtype: jnp.dtype) -> Array:
    """Room for the products of the experts of some layers, (L,P,features), packed."""
    return pack(jnp.zeros((layers, most_rows + padding(most_rows), features), dtype))


def new_gradient(weight: Array) -> Array:
    """What `weight_gradients` writes into: it leaves the zeros of empty groups."""
    return jnp.zeros_like(weight)


def grouped_matmul(rows: Array, weight: Array, group_sizes: Array, offset: Array | int = 0) -> Array:
    """`rows @ weight[offset + e]`, for each row the e of its group: (P,X), (S,X,Y) -> (P,Y)."""
    out = pack(jnp.zeros((rows.shape[0], weight.shape[2]), rows.dtype))
    return unpack(_multiply(rows, (weight,), group_sizes, offset, out))


def _multiply(
    rows: Array, weights: tuple[Array, ...], group_sizes: Array, offset: Array | int, out: Array, first: Array | int = 0
) -> Array:
    """Products with several weights side by side, written into `out` from row `first` on: (P,X), each (S,X,Y)."""
    sizes = block_sizes(rows.shape[0], group_sizes.shape[0])

    def group(e: Array, start: Array, end: Array, out: Array) -> Array:
        if rows.shape[0] > FEW_ROWS:  # one product is faster than one for each weight, and worth a copy of them
            weight = _side_by_side(weights, offset + e, rows.dtype)

        def block(size: int, e: Array, at: Array, stop: Array, is_first: bool, out: Array) -> Array:
            x = jax.lax.dynamic_slice_in_dim(rows, at, size)
            if rows.shape[0] > FEW_ROWS:
                product = matmul(x, weight)
            else:  # sliced here, a weight is read in place
                products = [matmul(x, in_dtype(weight[offset + e], rows.dtype)) for weight in weights]
                product = jnp.concatenate(products, axis=1)
            # A block may extend into the next one, which is computed later and overwrites the surplus.
            return _write(out, product, first + at)

        return _loop_blocks(sizes, e, start, end, block, out)

    return _loop_groups(group_sizes, group, out)


def grouped_matmul_transposed(
    d_out: Array, weights: tuple[Array, ...], group_sizes: Array, offset: Array | int = 0
) -> Array:
    """The gradient for rows that were multiplied by several weights: (P, sum of Y), each (S,X,Y) -> (P,X)."""
    sizes = block_sizes(d_out.shape[0], group_sizes.shape[0])

    def group(e: Array, start: Array, end: Array, d_rows: Array) -> Array:
        weight = _side_by_side(weights, offset + e, d_out.dtype)

        def block(size: int, e: Array, at: Array, stop: Array, is_first: bool, d_rows: Array) -> Array:
            d = jax.lax.dynamic_slice_in_dim(d_out, at, size)
            product = matmul(d, weight, transpose_b=True)
            return _write(d_rows, product, at)

        return _loop_blocks(sizes, e, start, end, block, d_rows)

    d_rows = pack(jnp.zeros((d_out.shape[0], weights[0].shape[1]), d_out.dtype))
    return unpack(_loop_groups(group_sizes, group, d_rows))


def grouped_swiglu(
    rows: Array,
    row_weights: Array,
    gate: Array,
    up: Array,
    group_sizes: Array,
    offset: Array | int = 0,
    kept: Kept | None = None,
) -> tuple[Array, Array]:
    """`swiglu` of products with `gate` and `up`, in the dtype of the rows, (P,F).

    The products are written side by side into a layer of `kept`, in place; None: into an array of one layer.

    rows (P,D), row_weights (P,1), each (S,D,F). Returns what is kept, and the result.
    """
    (P, _), F = rows.shape, gate.shape[2]
    if kept is None:
        kept = Kept(pack(jnp.zeros((1, P, 2 * F), rows.dtype)), layer=0)
    flat = kept.stack.reshape(-1, 2 * F)
    flat = _multiply(rows, (gate, up), group_sizes, offset, flat, first=kept.layer * P)
    stack = flat.reshape(kept.stack.shape)
    g, u = jnp.split(unpack(stack[kept.layer]), 2, axis=1)
    return stack, swiglu(g, u, row_weights).astype(rows.dtype)


def grouped_swiglu_gradients(
    d_out: Array, row_weights: Array, kept: Kept, down: Array, group_sizes: Array, offset: Array | int = 0
) -> tuple[Array, Array, Array]:
    """`swiglu` again, (P,F), and the gradients of `grouped_swiglu` for its products, (P,2F), and the row weights, (P,).

    d_out: (P,D), the gradient of its product with `down` (S,F,D).
    """
    d_h = grouped_matmul_transposed(d_out, (down,), group_sizes, offset)
    g, u = jnp.split(unpack(kept.stack[kept.layer]), 2, axis=1)
    h, d_gate, d_up, d_weights = swiglu_gradients(g, u, row_weights, d_h)
    return h.astype(d_out.dtype), jnp.concatenate([d_gate, d_up], axis=1).astype(d_out.dtype), d_weights


def weight_gradients(
    rows: Array, d_out: Array, group_sizes: Array, totals: tuple[Array, ...], offset: Array | int = 0
) -> tuple[Array, ...]:
    """The gradients for the weights by which the rows of each group were multiplied, written into E of `totals`.

    (P,X), (P, sum of Y), each (S,X,Y), of which those from `offset` on are overwritten, in place. They must be zero:
    those of empty groups are left as they are.
    """
    acc_dtype, sizes = at_least_float32(rows.dtype), block_sizes(rows.shape[0], group_sizes.shape[0])

    def group(e: Array, start: Array, end: Array, carry: tuple) -> tuple:
        def block(size: int, e: Array, at: Array, stop: Array, is_first: bool, total: Array) -> Array:
            in_group = (at + jnp.arange(size) < stop)[:, None]  # not the next block's
            x = jnp.where(in_group, jax.lax.dynamic_slice_in_dim(rows, at, size), 0)
            d = jax.lax.dynamic_slice_in_dim(d_out, at, size)
            product = matmul(x, d, acc_dtype, transpose_a=True)
            return product if is_first else total + product

        totals, scratch = carry
        scratch = _loop_blocks(sizes, e, start, end, block, scratch)
        columns = jnp.split(scratch[None], len(totals), axis=-1)
        written = (_write(total, part, offset + e) for total, part in zip(totals, columns, strict=True))
        return tuple(written), scratch

    # One buffer for all groups: a group's first block overwrites that of the previous group.
    scratch = jnp.zeros((rows.shape[1], d_out.shape[1]), acc_dtype)
    return _loop_groups(group_sizes, group, (totals, scratch))[0]


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


def _side_by_side(weights: tuple[Array, ...], e: Array, dtype: jnp.dtype) -> Array:
    """Several weights of one group as one (X, sum of Y); a dynamic slice copies them anyway."""
    return jnp.concatenate([cast(weight[e], dtype) for weight in weights], axis=1)


def _write(target: Array, value: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(target, packed_like(value, target), start, axis=0)
