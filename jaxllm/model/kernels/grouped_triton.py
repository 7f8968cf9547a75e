"""Grouped matrix products on an NVIDIA GPU: four Triton kernels, written in Pallas, on rows sorted by group.

XLA has none for a GPU that is on by default: it lowers `jax.lax.ragged_dot` to one dense product over all groups. Here
the tiles of rows are laid out group by group at run time, as many as the worst case needs (`ceil(M/b) + E`); a kernel
looks up its tile's group; an empty tile does nothing. Two of the kernels do an expert's SwiGLU and its gradient on the
tile that they have just computed, so that what it needs is neither written nor read again.

Weights, their gradients and what the backward pass needs are in stacks of all layers, of which each kernel reads or
writes a part in place.

    N tokens    M rows, sorted by group    E groups    S groups of a stack    L layers    D hidden    F expert hidden
    X in    Y out    b rows of a tile
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.export import is_symbolic_dim

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels.interface import ExpertKernels, ExpertRows, Gradients, Saved
from jaxllm.model.kernels.matmul import in_dtype
from jaxllm.model.kernels.swiglu import swiglu, swiglu_gradients

TILE = 128
"""Rows and columns of an output tile: the largest square that eight warps keep in registers in float32."""

SWIGLU_WIDTH = 64
"""Columns of a tile of which SwiGLU or its gradient is computed: they need the registers of several tiles."""

DEPTH = 32
"""Columns of one step along the contraction."""

Rows = tuple[Array, Array | None]
"""An array, and the token, (M,), by which each row is read from it; None: row i is its row i."""

SWIGLU, SWIGLU_GRADIENTS = "grouped_product_swiglu", "grouped_product_swiglu_gradients"
PRODUCT, TRANSPOSED, WEIGHT_GRADIENT = "grouped_product", "grouped_product_transposed", "grouped_weight_gradient"

_TILES = ("tile_group", "tile_start", "tile_end")
_OPERANDS = {
    SWIGLU: (*_TILES, "layer", "row_weights", "tokens", "rows", "weights", "weights", "saved"),
    SWIGLU_GRADIENTS: (*_TILES, "layer", "row_weights", "tokens", "rows", "weights", "saved"),
    PRODUCT: (*_TILES, "rows", "weights"),
    TRANSPOSED: (*_TILES, "rows", "weights", "weights"),
    WEIGHT_GRADIENT: ("group_start", "group_end", "offset", "tokens", "rows", "rows", "gradient", "gradient"),
}


def is_kernel(name: str) -> bool:
    return name in _OPERANDS


def operand_names(kernel: str, ranks: Sequence[int]) -> list[str]:
    """What the operands of a call are, given how many axes each has: calls may leave out `tokens` and the last ones.

    With `tokens`, a row of `rows` is read by its token; where there are two `rows`, those with fewer rows are.
    """
    names = [*_OPERANDS[kernel]]
    if "tokens" in names and ranks[names.index("tokens")] > 1:
        names.remove("tokens")
    return names[: len(ranks)]


_OPTIONS = triton.CompilerParams(num_warps=8, num_stages=4)
_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def padding(most_rows: int) -> int:
    """Rows of padding needed after the last group: none, since loads and stores are masked."""
    return 0


def prepared(weight: Array, dtype: jnp.dtype) -> Array:
    """Weights in the compute dtype: cast once, for all layers and both passes."""
    return in_dtype(weight, dtype)


def new_saved(layers: int, most_rows: int, features: int, dtype: jnp.dtype) -> Array:
    """Arbitrary contents: only rows that were written are read."""
    return jax.lax.empty((layers, most_rows, features), dtype)


def new_gradient(weight: Array) -> Array:
    """Arbitrary contents: `weight_gradients` overwrites everything."""
    return jax.lax.empty(weight.shape, weight.dtype)


def ffn(rows: ExpertRows, saved: Saved | None) -> tuple[Array, Array | None]:
    """`ExpertKernels.ffn`."""
    written, h = grouped_swiglu(rows, saved)
    return grouped_matmul(h, rows.weights[2], rows.group_sizes, rows.offset), written


def ffn_gradients(
    rows: ExpertRows, d_out: Array, saved: Saved | None, totals: Gradients
) -> tuple[Array, Array, Gradients]:
    """`ExpertKernels.ffn_gradients`, from what `ffn` saved; its part of `totals` may hold anything before."""
    (gate, up, _), tokens, group_sizes, offset = rows.weights, rows.tokens, rows.group_sizes, rows.offset
    h, d_gate_up, d_row_weights = grouped_swiglu_gradients(rows, d_out, saved)
    d_rows = grouped_matmul_transposed(d_gate_up, (gate, up), group_sizes, offset)
    if not totals:
        return d_rows, d_row_weights, totals
    d_gate, d_up, d_down = totals
    d_gate, d_up = weight_gradients((rows.x, tokens), (d_gate_up, None), group_sizes, (d_gate, d_up), offset)
    (d_down,) = weight_gradients((h, None), (d_out, tokens), group_sizes, (d_down,), offset)
    return d_rows, d_row_weights, (d_gate, d_up, d_down)


def grouped_matmul(rows: Array, weight: Array, group_sizes: Array, offset: Array | int = 0) -> Array:
    """`rows @ weight[offset + e]`, for each row the e of its group: (M,X), (S,X,Y) -> (M,Y)."""
    tiles = _lay_out(rows.shape[0], group_sizes, offset)
    return _product(rows, (weight,), tiles, transposed=False)


def grouped_matmul_transposed(
    d_out: Array, weights: tuple[Array, ...], group_sizes: Array, offset: Array | int = 0
) -> Array:
    """The gradient for rows that were multiplied by several weights: (M, sum of Y), each (S,X,Y) -> (M,X)."""
    tiles = _lay_out(d_out.shape[0], group_sizes, offset)
    return _product(d_out, weights, tiles, transposed=True)


def grouped_swiglu(rows: ExpertRows, saved: Saved | None) -> tuple[Array | None, Array]:
    """`swiglu` of the rows' products with gate and up, in the dtype of x, (M,F).

    The products are written side by side into a layer of `saved.rows`, in place. Returns what is saved, and the result.
    """
    x, tokens, row_weights, group_sizes, (gate, up, _), offset, _ = rows
    M, D, F, dtype = row_weights.shape[0], x.shape[1], gate.shape[2], x.dtype
    tiles = _lay_out(M, group_sizes, offset)
    index, stacks = () if tokens is None else (tokens,), () if saved is None else (saved.rows,)
    operands = 8 + len(index)
    depth, width = _side(D, DEPTH), _side(F, SWIGLU_WIDTH)

    def kernel(group_ref, start_ref, end_ref, layer_ref, row_weights_ref, *refs):
        *tokens_ref, x_ref, gate_ref, up_ref = refs[: 3 + len(index)]
        *_, h_ref = refs
        number, at = pl.program_id(0), pl.program_id(1) * width
        group, start, end = group_ref[number], start_ref[number], end_ref[number]
        tile_rows, columns, up_columns = pl.ds(start, TILE), pl.ds(at, width), pl.ds(F + at, width)
        in_group = (start + jnp.arange(TILE) < end)[:, None]
        own_tokens = _tokens(tokens_ref, tile_rows, in_group)

        def step(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
            along = pl.ds(i * depth, depth)
            x_rows = _load(x_ref, own_tokens, tile_rows, i * depth, depth, in_group)
            products = (triton.dot(x_rows, triton.load(ref.at[group, along, columns])) for ref in (gate_ref, up_ref))
            g, u = (total + product for total, product in zip(totals, products, strict=True))
            return g, u

        steps = jnp.where(start < end, jnp.int32(D // depth), jnp.int32(0))
        zeros = jnp.zeros((TILE, width), jnp.float32)
        # rounded first, so that the backward pass computes from the same numbers
        g, u = (total.astype(dtype) for total in jax.lax.fori_loop(0, steps, step, (zeros, zeros)))
        row_weight = triton.load(row_weights_ref.at[tile_rows, pl.ds(0, 1)], mask=in_group, other=0)
        triton.store(h_ref.at[tile_rows, columns], swiglu(g, u, row_weight).astype(dtype), mask=in_group)
        if saved is not None:
            saved_ref = refs[-2]
            triton.store(saved_ref.at[layer_ref[0], tile_rows, columns], g, mask=in_group)
            triton.store(saved_ref.at[layer_ref[0], tile_rows, up_columns], u, mask=in_group)

    *stack, h = pl.pallas_call(
        kernel,
        grid=(tiles.group.shape[0], F // width),
        in_specs=[_ANYWHERE] * (operands + len(stacks)),
        out_specs=[_ANYWHERE] * (1 + len(stacks)),
        out_shape=[*map(_like, stacks), jax.ShapeDtypeStruct((M, F), dtype)],
        input_output_aliases={operands + i: i for i in range(len(stacks))},
        compiler_params=_OPTIONS,
        name=SWIGLU,
    )(*tiles, _scalar(0 if saved is None else saved.layer), row_weights, *index, x, gate, up, *stacks)
    return (stack[0] if stack else None), h


def grouped_swiglu_gradients(rows: ExpertRows, d_out: Array, saved: Saved | None) -> tuple[Array, Array, Array]:
    """`swiglu` again, (M,F), and the gradients of `grouped_swiglu` for its products, (M,2F), and row weights, (M,1).

    d_out: (N,D), the gradient of the output, by token; a row reads its token's.
    """
    if saved is None:
        raise ValueError("the Triton kernels need what the forward pass saved: they have no backward pass without it")
    _, tokens, row_weights, group_sizes, (*_, down), offset, _ = rows
    M, D, F, dtype = row_weights.shape[0], d_out.shape[1], down.shape[1], d_out.dtype
    tiles = _lay_out(M, group_sizes, offset)
    index = () if tokens is None else (tokens,)
    depth, width = _side(D, DEPTH), _side(F, SWIGLU_WIDTH)

    def kernel(group_ref, start_ref, end_ref, layer_ref, row_weights_ref, *refs):
        *tokens_ref, d_out_ref, down_ref, saved_ref, h_ref, d_gate_up_ref, part_ref = refs
        number, block, layer = pl.program_id(0), pl.program_id(1), layer_ref[0]
        group, start, end = group_ref[number], start_ref[number], end_ref[number]
        tile_rows, columns, up_columns = (
            pl.ds(start, TILE), pl.ds(block * width, width), pl.ds(F + block * width, width)
        )  # fmt: skip
        in_group = (start + jnp.arange(TILE) < end)[:, None]
        own_tokens = _tokens(tokens_ref, tile_rows, in_group)

        def step(i: Array, total: Array) -> Array:
            along = pl.ds(i * depth, depth)
            d = _load(d_out_ref, own_tokens, tile_rows, i * depth, depth, in_group)
            return total + triton.dot(d, triton.load(down_ref.at[group, columns, along]), trans_b=True)

        steps = jnp.where(start < end, jnp.int32(D // depth), jnp.int32(0))
        d_h = jax.lax.fori_loop(0, steps, step, jnp.zeros((TILE, width), jnp.float32))
        g = triton.load(saved_ref.at[layer, tile_rows, columns], mask=in_group, other=0)
        u = triton.load(saved_ref.at[layer, tile_rows, up_columns], mask=in_group, other=0)
        row_weight = triton.load(row_weights_ref.at[tile_rows, pl.ds(0, 1)], mask=in_group, other=0)
        h, d_gate, d_up, d_weight = swiglu_gradients(g, u, row_weight, d_h)
        triton.store(h_ref.at[tile_rows, columns], h.astype(dtype), mask=in_group)
        triton.store(d_gate_up_ref.at[tile_rows, columns], d_gate.astype(dtype), mask=in_group)
        triton.store(d_gate_up_ref.at[tile_rows, up_columns], d_up.astype(dtype), mask=in_group)
        triton.store(part_ref.at[tile_rows, pl.ds(block, 1)], d_weight[:, None], mask=in_group)

    h, d_gate_up, parts = pl.pallas_call(
        kernel,
        grid=(tiles.group.shape[0], F // width),
        in_specs=[_ANYWHERE] * (8 + len(index)),
        out_specs=[_ANYWHERE] * 3,
        out_shape=[
            jax.ShapeDtypeStruct((M, F), dtype),
            jax.ShapeDtypeStruct((M, 2 * F), dtype),
            jax.ShapeDtypeStruct((M, F // width), jnp.float32),
        ],
        compiler_params=_OPTIONS,
        name=SWIGLU_GRADIENTS,
    )(*tiles, _scalar(saved.layer), row_weights, *index, d_out, down, saved.rows)
    return h, d_gate_up, parts.sum(axis=1, keepdims=True)


def weight_gradients(
    rows: Rows, d_out: Rows, group_sizes: Array, totals: tuple[Array, ...], offset: Array | int = 0
) -> tuple[Array, ...]:
    """The gradients for the weights by which the rows of each group were multiplied, written into E of `totals`.

    Rows of X and of sum of Y numbers; each total is (S,X,Y), of which E from `offset` on are overwritten, in place.
    """
    (x, x_tokens), (d, d_tokens) = rows, d_out
    X, E = x.shape[1], group_sizes.shape[0]
    indices = tuple(tokens for tokens in (x_tokens, d_tokens) if tokens is not None)
    Y = totals[0].shape[2]
    height, width = _side(X, TILE), _side(Y, TILE)

    def kernel(start_ref, end_ref, offset_ref, *refs):
        *tokens_refs, x_ref, d_ref = refs[: 2 + len(indices)]
        x_tokens_ref = [] if x_tokens is None else tokens_refs[:1]
        d_tokens_ref = [] if d_tokens is None else tokens_refs[-1:]
        group, block = pl.program_id(0), pl.program_id(2)
        start, end = start_ref[group], end_ref[group]
        first_row, first_column = pl.program_id(1) * height, block * width

        def step(i: Array, total: Array) -> Array:
            at = start + i * DEPTH
            step_rows, in_group = pl.ds(at, DEPTH), (at + jnp.arange(DEPTH) < end)[:, None]
            x_own, d_own = (_tokens(ref, step_rows, in_group) for ref in (x_tokens_ref, d_tokens_ref))
            x_rows = _load(x_ref, x_own, step_rows, first_row, height, in_group)
            d_rows = _load(d_ref, d_own, step_rows, first_column, width, in_group)
            return total + triton.dot(x_rows, d_rows, trans_a=True)

        steps = (end - start + DEPTH - 1) // DEPTH
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((height, width), jnp.float32))
        for part, ref in enumerate(refs[-len(totals) :]):
            first = part * (Y // width)

            @pl.when((block >= first) & (block < first + Y // width))
            def _(ref=ref, first=first):
                target = ref.at[offset_ref[0] + group, pl.ds(first_row, height), pl.ds((block - first) * width, width)]
                triton.store(target, total.astype(ref.dtype))

    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    operands = 5 + len(indices)
    made = pl.pallas_call(
        kernel,
        grid=(E, X // height, len(totals) * Y // width),
        in_specs=[_ANYWHERE] * (operands + len(totals)),
        out_specs=[_ANYWHERE] * len(totals),
        out_shape=[*map(_like, totals)],
        input_output_aliases={operands + i: i for i in range(len(totals))},
        compiler_params=_OPTIONS,
        name=WEIGHT_GRADIENT,
    )(ends - group_sizes.astype(jnp.int32), ends, _scalar(offset), *indices, x, d, *totals)
    return tuple(made)


def _scalar(value: Array | int) -> Array:
    return jnp.asarray(value, jnp.int32).reshape(1)


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _tokens(tokens_ref: list, rows: Any, in_group: Array) -> Array | None:
    """The tokens of some rows, (b,), from the reference in the list; None: there is none."""
    return triton.load(tokens_ref[0].at[rows], mask=in_group[:, 0], other=0) if tokens_ref else None


def _load(ref: Any, tokens: Array | None, rows: Any, start: Array, width: int, in_group: Array) -> Array:
    """Columns of some rows, which are those of their tokens if there are any: (b,width), zeros outside of the group."""
    if tokens is None:
        part = ref.at[rows, pl.ds(start, width)]
    else:
        part = ref.at[tokens[:, None], (start + jnp.arange(width))[None]]
    return triton.load(part, mask=in_group, other=0)


class _Tiles(NamedTuple):
    group: Array  # (tiles,) int32, in the stack
    start: Array  # (tiles,) int32, first row
    end: Array  # (tiles,) int32, the row after the group's last; 0 for an empty tile


def _lay_out(most_rows: int, group_sizes: Array, offset: Array | int) -> _Tiles:
    if is_symbolic_dim(most_rows):
        raise ValueError("Triton's grid needs numbers for batch and time: export a CustomLLM(..., platform='any')")
    E = group_sizes.shape[0]
    tiles = (group_sizes + TILE - 1) // TILE
    ends, last_tiles = jnp.cumsum(group_sizes), jnp.cumsum(tiles)
    number = jnp.arange(pl.cdiv(most_rows, TILE) + E)
    group = jnp.minimum((number[:, None] >= last_tiles).sum(axis=1), E - 1)
    start = (ends - group_sizes)[group] + (number - (last_tiles - tiles)[group]) * TILE
    end = jnp.where(number < last_tiles[-1], ends[group], 0)
    return _Tiles(*(a.astype(jnp.int32) for a in (offset + group, start, end)))


def _side(features: int, most: int) -> int:
    """The largest power of two, up to `most`, that divides a dimension; `applies` ensures at least 16."""
    return min(most, features & -features)


def applies(*features: int) -> bool:
    """Whether tiles of a size that the matrix units accept divide these dimensions."""
    return all(width % 16 == 0 for width in features)


def _product(rows: Array, weights: tuple[Array, ...], tiles: _Tiles, *, transposed: bool) -> Array:
    """(M,X) by one (S,X,Y); or with `transposed` (M, sum of Y) by the transposes of all."""
    _, X, Y = weights[0].shape
    contract, out = (Y, X) if transposed else (X, Y)
    depth, width = _side(contract, DEPTH), _side(out, TILE)

    def kernel(group_ref, start_ref, end_ref, rows_ref, *refs):
        number, columns = pl.program_id(0), pl.ds(pl.program_id(1) * width, width)
        group, start, end = group_ref[number], start_ref[number], end_ref[number]
        tile_rows = pl.ds(start, TILE)
        in_group = (start + jnp.arange(TILE) < end)[:, None]
        *weight_refs, out_ref = refs

        steps = jnp.where(start < end, jnp.int32(contract // depth), jnp.int32(0))
        total = jnp.zeros((TILE, width), jnp.float32)
        for part, weight_ref in enumerate(weight_refs):

            def step(i: Array, total: Array, first=part * contract, weight_ref=weight_ref) -> Array:
                along = pl.ds(i * depth, depth)
                x = triton.load(rows_ref.at[tile_rows, pl.ds(first + i * depth, depth)], mask=in_group, other=0)
                if transposed:
                    return total + triton.dot(x, triton.load(weight_ref.at[group, columns, along]), trans_b=True)
                return total + triton.dot(x, triton.load(weight_ref.at[group, along, columns]))

            total = jax.lax.fori_loop(0, steps, step, total)
        triton.store(out_ref.at[tile_rows, columns], total.astype(out_ref.dtype), mask=in_group)

    return pl.pallas_call(
        kernel,
        grid=(tiles.group.shape[0], out // width),
        in_specs=[_ANYWHERE] * (4 + len(weights)),
        out_specs=_ANYWHERE,
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], out), rows.dtype),
        compiler_params=_OPTIONS,
        name=TRANSPOSED if transposed else PRODUCT,
    )(*tiles, rows, *weights)


KERNELS = ExpertKernels(ffn, ffn_gradients, padding, prepared, new_saved, new_gradient)
