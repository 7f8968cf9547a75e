"""Grouped matrix products on an NVIDIA GPU: four Triton kernels, written in Pallas, on rows sorted by group.

XLA has none for a GPU that is on by default: it lowers `jax.lax.ragged_dot` to one dense product over all groups. Here
the tiles of rows are laid out group by group at run time, as many as the worst case needs (`ceil(M/b) + E`); a kernel
looks up its tile's group; an empty tile does nothing. Two of the kernels do an expert's SwiGLU and its gradient on the
tile that they have just computed, so that what it needs is neither written nor read again.

    M rows    E groups    X in    Y out    b rows of a tile
    of an expert: D hidden    F expert hidden
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.export import is_symbolic_dim

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels.swiglu import swiglu, swiglu_gradients

TILE = 128
"""Rows and columns of an output tile: the largest square that eight warps keep in registers in float32."""

SWIGLU_WIDTH = 64
"""Columns of a tile of which SwiGLU or its gradient is computed: they need the registers of several tiles."""

DEPTH = 32
"""Columns of one step along the contraction."""

_OPTIONS = triton.CompilerParams(num_warps=8, num_stages=4)
_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def padding(most_rows: int) -> int:
    """Rows of padding needed after the last group: none, since loads and stores are masked."""
    return 0


def grouped_matmul(
    rows: Array, weights: tuple[Array, ...], group_sizes: Array, offset: Array | int = 0, *, interpret: bool = False
) -> Array:
    """`rows @ weight[offset + e]`, for each row the e of its group: (M,X), each (>= E,X,Y) -> (M, sum of Y)."""
    local = [jax.lax.dynamic_slice_in_dim(weight, offset, group_sizes.shape[0]) for weight in weights]
    return _product(rows, _side_by_side(local, rows.dtype), _lay_out(rows.shape[0], group_sizes), False, interpret)


def grouped_matmul_transposed(
    d_out: Array, weights: tuple[Array, ...], group_sizes: Array, *, interpret: bool = False
) -> Array:
    """The gradient of `grouped_matmul` for its rows: (M, sum of Y), each (E,X,Y) -> (M,X)."""
    return _product(d_out, _side_by_side(weights, d_out.dtype), _lay_out(d_out.shape[0], group_sizes), True, interpret)


def grouped_swiglu(
    rows: Array,
    row_weights: Array,
    gate: Array,
    up: Array,
    group_sizes: Array,
    offset: Array | int = 0,
    *,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Products with `gate` and `up` side by side, (M,2F), and of these `swiglu` in the dtype of the rows, (M,F).

    rows (M,D), row_weights (M,1), each (>= E,D,F).
    """
    local = [jax.lax.dynamic_slice_in_dim(weight, offset, group_sizes.shape[0]) for weight in (gate, up)]
    weight, tiles = _side_by_side(local, rows.dtype), _lay_out(rows.shape[0], group_sizes)
    (M, D), F = rows.shape, gate.shape[2]
    depth, width = _side(D, DEPTH), _side(F, SWIGLU_WIDTH)

    def kernel(group_ref, start_ref, end_ref, row_weights_ref, rows_ref, weight_ref, gate_up_ref, h_ref):
        number, at = pl.program_id(0), pl.program_id(1) * width
        group, start, end = group_ref[number], start_ref[number], end_ref[number]
        tile_rows, columns, up_columns = pl.ds(start, TILE), pl.ds(at, width), pl.ds(F + at, width)
        in_group = (start + jnp.arange(TILE) < end)[:, None]

        def step(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
            along = pl.ds(i * depth, depth)
            x = triton.load(rows_ref.at[tile_rows, along], mask=in_group, other=0)
            products = (triton.dot(x, triton.load(weight_ref.at[group, along, c])) for c in (columns, up_columns))
            g, u = (total + product for total, product in zip(totals, products, strict=True))
            return g, u

        steps = jnp.where(start < end, jnp.int32(D // depth), jnp.int32(0))
        zeros = jnp.zeros((TILE, width), jnp.float32)
        # rounded first, so that the backward pass computes from the same numbers
        g, u = (total.astype(rows.dtype) for total in jax.lax.fori_loop(0, steps, step, (zeros, zeros)))
        row_weight = triton.load(row_weights_ref.at[tile_rows, pl.ds(0, 1)], mask=in_group, other=0)
        triton.store(gate_up_ref.at[tile_rows, columns], g, mask=in_group)
        triton.store(gate_up_ref.at[tile_rows, up_columns], u, mask=in_group)
        triton.store(h_ref.at[tile_rows, columns], swiglu(g, u, row_weight).astype(rows.dtype), mask=in_group)

    gate_up, h = pl.pallas_call(
        kernel,
        grid=(tiles.group.shape[0], F // width),
        in_specs=[_ANYWHERE] * 6,
        out_specs=[_ANYWHERE] * 2,
        out_shape=[jax.ShapeDtypeStruct((M, 2 * F), rows.dtype), jax.ShapeDtypeStruct((M, F), rows.dtype)],
        compiler_params=_OPTIONS,
        interpret=interpret,
        name="grouped_product_swiglu",
    )(*tiles, row_weights, rows, weight)
    return gate_up, h


def grouped_swiglu_gradients(
    d_out: Array, row_weights: Array, gate_up: Array, down: Array, group_sizes: Array, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """`swiglu` again, (M,F), and the gradients of `grouped_swiglu` for its products, (M,2F), and the row weights, (M,).

    d_out: (M,D), the gradient of its product with `down` (E,F,D).
    """
    (M, D), F, dtype = d_out.shape, down.shape[1], d_out.dtype
    tiles = _lay_out(M, group_sizes)
    depth, width = _side(D, DEPTH), _side(F, SWIGLU_WIDTH)

    def kernel(
        group_ref, start_ref, end_ref, row_weights_ref, gate_up_ref, d_out_ref, down_ref, h_ref, d_gate_up_ref, part_ref
    ):
        number, block = pl.program_id(0), pl.program_id(1)
        group, start, end = group_ref[number], start_ref[number], end_ref[number]
        tile_rows, columns, up_columns = (
            pl.ds(start, TILE), pl.ds(block * width, width), pl.ds(F + block * width, width)
        )  # fmt: skip
        in_group = (start + jnp.arange(TILE) < end)[:, None]

        def step(i: Array, total: Array) -> Array:
            along = pl.ds(i * depth, depth)
            d = triton.load(d_out_ref.at[tile_rows, along], mask=in_group, other=0)
            return total + triton.dot(d, triton.load(down_ref.at[group, columns, along]), trans_b=True)

        steps = jnp.where(start < end, jnp.int32(D // depth), jnp.int32(0))
        d_h = jax.lax.fori_loop(0, steps, step, jnp.zeros((TILE, width), jnp.float32))
        g = triton.load(gate_up_ref.at[tile_rows, columns], mask=in_group, other=0)
        u = triton.load(gate_up_ref.at[tile_rows, up_columns], mask=in_group, other=0)
        row_weight = triton.load(row_weights_ref.at[tile_rows, pl.ds(0, 1)], mask=in_group, other=0)
        h, d_gate, d_up, d_weight = swiglu_gradients(g, u, row_weight, d_h)
        triton.store(h_ref.at[tile_rows, columns], h.astype(dtype), mask=in_group)
        triton.store(d_gate_up_ref.at[tile_rows, columns], d_gate.astype(dtype), mask=in_group)
        triton.store(d_gate_up_ref.at[tile_rows, up_columns], d_up.astype(dtype), mask=in_group)
        triton.store(part_ref.at[tile_rows, pl.ds(block, 1)], d_weight[:, None], mask=in_group)

    h, d_gate_up, parts = pl.pallas_call(
        kernel,
        grid=(tiles.group.shape[0], F // width),
        in_specs=[_ANYWHERE] * 7,
        out_specs=[_ANYWHERE] * 3,
        out_shape=[
            jax.ShapeDtypeStruct((M, F), dtype),
            jax.ShapeDtypeStruct((M, 2 * F), dtype),
            jax.ShapeDtypeStruct((M, F // width), jnp.float32),
        ],
        compiler_params=_OPTIONS,
        interpret=interpret,
        name="grouped_product_swiglu_gradients",
    )(*tiles, row_weights, gate_up, d_out, down.astype(dtype))
    return h, d_gate_up, parts.sum(axis=1)


def weight_gradients(
    rows: Array, d_out: Array, group_sizes: Array, parts: int, *, interpret: bool = False
) -> list[Array]:
    """The gradients of `grouped_matmul` for its weights, of which there are `parts` of equal width; in float32.

    (M,X), (M, sum of Y) -> each (E,X,Y).
    """
    return jnp.split(_weight_gradient(rows, d_out, group_sizes, interpret), parts, axis=-1)


def _side_by_side(weights: Sequence[Array], dtype: jnp.dtype) -> Array:
    """Several weights as one (E, X, sum of Y); the cast copies them anyway."""
    return jnp.concatenate([weight.astype(dtype) for weight in weights], axis=-1)


class _Tiles(NamedTuple):
    group: Array  # (tiles,) int32
    start: Array  # (tiles,) int32, first row
    end: Array  # (tiles,) int32, the row after the group's last; 0 for an empty tile


def _lay_out(most_rows: int, group_sizes: Array) -> _Tiles:
    if is_symbolic_dim(most_rows):
        raise ValueError("Triton's grid needs numbers for batch and time: export a CustomLLM(..., platform='any')")
    E = group_sizes.shape[0]
    tiles = (group_sizes + TILE - 1) // TILE
    ends, last_tiles = jnp.cumsum(group_sizes), jnp.cumsum(tiles)
    number = jnp.arange(pl.cdiv(most_rows, TILE) + E)
    group = jnp.minimum((number[:, None] >= last_tiles).sum(axis=1), E - 1)
    start = (ends - group_sizes)[group] + (number - (last_tiles - tiles)[group]) * TILE
    end = jnp.where(number < last_tiles[-1], ends[group], 0)
    return _Tiles(*(a.astype(jnp.int32) for a in (group, start, end)))


def _side(features: int, most: int) -> int:
    """The largest power of two, up to `most`, that divides a dimension; `applies` ensures at least 16."""
    return min(most, features & -features)


def applies(*features: int) -> bool:
    """Whether tiles of a size that the matrix units accept divide these dimensions."""
    return all(width % 16 == 0 for width in features)


def _product(rows: Array, weight: Array, tiles: _Tiles, transposed: bool, interpret: bool) -> Array:
    """(M,X) by (E,X,Y), or with `transposed` (M,Y) by its transpose."""
    contract, out = (weight.shape[2], weight.shape[1]) if transposed else weight.shape[1:]
    depth, width = _side(contract, DEPTH), _side(out, TILE)

    def kernel(group_ref, start_ref, end_ref, rows_ref, weight_ref, out_ref):
        number, columns = pl.program_id(0), pl.ds(pl.program_id(1) * width, width)
        group, start, end = group_ref[number], start_ref[number], end_ref[number]
        tile_rows = pl.ds(start, TILE)
        in_group = (start + jnp.arange(TILE) < end)[:, None]

        def step(i: Array, total: Array) -> Array:
            along = pl.ds(i * depth, depth)
            x = triton.load(rows_ref.at[tile_rows, along], mask=in_group, other=0)
            if transposed:
                return total + triton.dot(x, triton.load(weight_ref.at[group, columns, along]), trans_b=True)
            return total + triton.dot(x, triton.load(weight_ref.at[group, along, columns]))

        steps = jnp.where(start < end, jnp.int32(contract // depth), jnp.int32(0))
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((TILE, width), jnp.float32))
        triton.store(out_ref.at[tile_rows, columns], total.astype(out_ref.dtype), mask=in_group)

    return pl.pallas_call(
        kernel,
        grid=(tiles.group.shape[0], out // width),
        in_specs=[_ANYWHERE] * 5,
        out_specs=_ANYWHERE,
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], out), rows.dtype),
        compiler_params=_OPTIONS,
        interpret=interpret,
        name="grouped_product_transposed" if transposed else "grouped_product",
    )(*tiles, rows, weight)


def _weight_gradient(rows: Array, d_out: Array, group_sizes: Array, interpret: bool) -> Array:
    (_, X), Y, E = rows.shape, d_out.shape[1], group_sizes.shape[0]
    height, width = _side(X, TILE), _side(Y, TILE)

    def kernel(start_ref, end_ref, rows_ref, d_out_ref, out_ref):
        group = pl.program_id(0)
        start, end = start_ref[group], end_ref[group]
        down, across = pl.ds(pl.program_id(1) * height, height), pl.ds(pl.program_id(2) * width, width)

        def step(i: Array, total: Array) -> Array:
            at = start + i * DEPTH
            in_group = (at + jnp.arange(DEPTH) < end)[:, None]
            x = triton.load(rows_ref.at[pl.ds(at, DEPTH), down], mask=in_group, other=0)
            d = triton.load(d_out_ref.at[pl.ds(at, DEPTH), across], mask=in_group, other=0)
            return total + triton.dot(x, d, trans_a=True)

        steps = (end - start + DEPTH - 1) // DEPTH
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((height, width), jnp.float32))
        triton.store(out_ref.at[group, down, across], total)

    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    return pl.pallas_call(
        kernel,
        grid=(E, X // height, Y // width),
        in_specs=[_ANYWHERE] * 4,
        out_specs=_ANYWHERE,
        out_shape=jax.ShapeDtypeStruct((E, X, Y), jnp.float32),
        compiler_params=_OPTIONS,
        interpret=interpret,
        name="grouped_weight_gradient",
    )(ends - group_sizes.astype(jnp.int32), ends, rows, d_out)
