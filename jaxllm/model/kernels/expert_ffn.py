"""The experts' SwiGLU on rows sorted by expert, each times its weight, with an explicit gradient. No row is dropped.

The two passes are those of a device's kernels (`grouped_loop`, `grouped_triton`), which autodiff cannot differentiate.
A row's weight, the gate of its expert, multiplies before the last product: so its gradient does not need the experts'
outputs. The backward pass keeps the two pre-activations (2*M*F numbers), which saves a quarter of its products, and
recomputes the rest.

    M rows, sorted by expert    D hidden    F expert hidden    E experts of a layer    S of a stack    L layers
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.kernels.stacks import Carried, Kept, Weights


def expert_ffn(grouped: ModuleType, rows: Array, row_weights: Array, masters: Weights, group_sizes: Array) -> Array:
    """`(w * silu(rows @ gate[e]) * (rows @ up[e])) @ down[e]`, for each row the expert e of its group and its weight w.

    Args:
        grouped: the kernels, `Kernels.grouped`.
        rows: (M, D), sorted by expert, in the compute dtype.
        row_weights: (M,), in float32 or wider.
        masters: gate, up (E,D,F) and down (E,F,D).
        group_sizes: (E,) int, rows of each expert. Rows after the last group have undefined results and gradients.

    Returns (M, D). The weights' gradients accumulate in float32 (or wider) and are returned in the masters' dtype.
    """
    weights, carried = prepare(grouped, masters, rows.dtype), Carried(masters, kept=None)
    made: Any = expert_ffn_in_stack(grouped, rows, row_weights, weights, carried, group_sizes, 0)
    return made[0]


def prepare(grouped: ModuleType, masters: Pytree, dtype: jnp.dtype) -> Pytree:
    """Masters as `expert_ffn_in_stack` reads them in this compute dtype. They have no gradient."""
    return jax.tree.map(lambda weight: grouped.prepared(jax.lax.stop_gradient(weight), dtype), masters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn_in_stack(
    grouped: ModuleType,
    rows: Array,
    row_weights: Array,
    weights: Weights,
    carried: Carried,
    group_sizes: Array,
    offset: Array | int,
) -> tuple[Array, Carried]:
    """`expert_ffn` by the E experts that begin at `offset` in a stack of S, without a copy of any.

    Args:
        weights: what `prepare` makes of the masters: gate, up (S,D,F) and down (S,F,D).
        carried: holds the masters, for their gradient. A layer's experts are used once in a pass.

    Returns (M, D), and what is carried on.
    """
    return _products(grouped, rows, row_weights, weights, group_sizes, offset, kept=None)[0], carried


def _products(
    grouped: ModuleType,
    rows: Array,
    row_weights: Array,
    weights: Weights,
    group_sizes: Array,
    offset: Array | int,
    kept: Kept | None,
) -> tuple[Array, Any]:
    x, row_weights = _pad(grouped, rows), _pad(grouped, row_weights[:, None])
    out, stack = grouped.ffn(x, row_weights, weights, group_sizes, offset, kept)
    return out[: rows.shape[0]], stack


def _forward(
    grouped: ModuleType,
    rows: Array,
    row_weights: Array,
    weights: Weights,
    carried: Carried,
    group_sizes: Array,
    offset: Array | int,
):
    if carried.masters is None:
        raise ValueError("decoding has no gradient: differentiate the model's call, which takes whole sequences")
    products = functools.partial(_products, grouped, rows, row_weights, weights, group_sizes, offset)
    if carried.kept is None:
        room = grouped.new_kept(1, rows.shape[0], 2 * weights[0].shape[2], rows.dtype)
        out, own = products(Kept(room, layer=0))
    else:
        out, stack = products(Kept(carried.kept, layer=offset // group_sizes.shape[0]))
        own, carried = None, carried._replace(kept=stack)
    return (out, carried), (rows, row_weights, weights, group_sizes, offset, own)


def _backward(grouped: ModuleType, saved: tuple, cotangents: tuple[Array, Carried]) -> tuple:
    rows, row_weights, weights, group_sizes, offset, own = saved
    d_out, carried = cotangents
    if own is None:
        assert carried.kept is not None  # as in the forward pass
        kept = Kept(carried.kept, layer=offset // group_sizes.shape[0])
    else:
        kept = Kept(own, layer=0)
    x, d_y, padded = _pad(grouped, rows), _pad(grouped, d_out), _pad(grouped, row_weights[:, None])
    d_rows, d_row_weights, masters = grouped.ffn_gradients(
        x, padded, d_y, weights, kept, group_sizes, carried.masters, offset
    )
    M = rows.shape[0]
    d_row_weights = d_row_weights[:M, 0].astype(row_weights.dtype)
    return d_rows[:M], d_row_weights, None, carried._replace(masters=masters), None, None


expert_ffn_in_stack.defvjp(_forward, _backward)


def _pad(grouped: ModuleType, rows: Array) -> Array:
    return jnp.pad(rows, ((0, grouped.padding(rows.shape[0])), (0, 0)))
