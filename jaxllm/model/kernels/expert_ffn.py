"""The routed experts of a layer, from tokens to tokens, with an explicit gradient. No row is dropped.

Each token goes to k experts. The output is the sum of their SwiGLU networks, each times its gate. The passes over the
experts are those of a device's kernels (`grouped_loop`, `grouped_triton`), which autodiff cannot differentiate. They
read each row directly from the tokens, so no sorted copy is written. All other moves of rows are gathers; autodiff
would use scatters in the backward pass.

A gate multiplies before the last product: so its gradient does not need the experts' outputs. The two pre-activations
(2*M*F numbers) are kept for the backward pass, which saves a quarter of its products, or made again there.

    N tokens    k experts of each    M rows, sorted by expert    D hidden    F expert hidden
    E experts of a layer    S of a stack    L layers
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.kernels.dispatch import Dispatch, combine, gather_slots
from jaxllm.model.kernels.matmul import keep
from jaxllm.model.kernels.stacks import Carried, Kept, Weights


def expert_ffn(grouped: ModuleType, x: Array, gates: Array, masters: Weights, plan: Dispatch) -> Array:
    """The sum of `(gates[n,j] * silu(x[n] @ gate[e]) * (x[n] @ up[e])) @ down[e]` over the chosen experts e of a token.

    Args:
        grouped: the kernels, `Kernels.grouped`.
        x: (N, D), in the compute dtype.
        gates: (N, k), in float32 or wider.
        masters: gate, up (E,D,F) and down (E,F,D), in float32 or wider.
        plan: the experts' rows. Slots of other devices contribute nothing, and have no gradient.

    Returns (N, D). The weights' gradients have the masters' dtype.
    """
    weights, carried = prepare(grouped, masters, x.dtype), Carried(masters, kept=None)
    made: Any = expert_ffn_in_stack(grouped, False, x, gates, weights, carried, plan, 0)
    return made[0]


def prepare(grouped: ModuleType, masters: Pytree, dtype: jnp.dtype) -> Pytree:
    """Masters as `expert_ffn_in_stack` reads them in this compute dtype. They have no gradient."""
    return jax.tree.map(lambda weight: grouped.prepared(jax.lax.stop_gradient(weight), dtype), masters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expert_ffn_in_stack(
    grouped: ModuleType,
    recompute: bool,
    x: Array,
    gates: Array,
    weights: Weights,
    carried: Carried,
    plan: Dispatch,
    offset: Array | int,
) -> tuple[Array, Carried]:
    """`expert_ffn` by the E experts that begin at `offset` in a stack of S, without a copy of any.

    Args:
        recompute: make the pre-activations again in the backward pass, if `carried` has no room for them.
        weights: what `prepare` makes of the masters: gate, up (S,D,F) and down (S,F,D).
        carried: holds the masters, for their gradient. A layer's experts are used once in a pass.

    Returns (N, D), and what is carried on.
    """
    return _products(grouped, x, gates, weights, plan, offset, kept=None)[0], carried


def _products(
    grouped: ModuleType,
    x: Array,
    gates: Array,
    weights: Weights,
    plan: Dispatch,
    offset: Array | int,
    kept: Kept | None,
) -> tuple[Array, Any]:
    tokens, row_weights = _tokens_and_gates(grouped, gates, plan)
    out, stack = grouped.ffn(x, tokens, row_weights, weights, plan.group_sizes, offset, kept)
    return combine(out[: gates.size], plan), stack


def _tokens_and_gates(grouped: ModuleType, gates: Array, plan: Dispatch) -> tuple[Array | None, Array]:
    """The token, (P,), and the gate, (P,1), of each row, with those of the padding that the kernels ask for."""
    if plan.order is None:
        return None, gates
    slots = jnp.pad(plan.order, (0, grouped.padding(plan.order.size)))
    return slots // gates.shape[1], gates.reshape(-1)[slots][:, None]


def _forward(
    grouped: ModuleType,
    recompute: bool,
    x: Array,
    gates: Array,
    weights: Weights,
    carried: Carried,
    plan: Dispatch,
    offset: Array | int,
):
    if carried.masters is None:
        raise ValueError("decoding has no gradient: differentiate the model's call, which takes whole sequences")
    products = functools.partial(_products, grouped, x, gates, weights, plan, offset)
    if carried.kept is None:
        room = None if recompute else Kept(grouped.new_kept(1, gates.size, 2 * weights[0].shape[2], x.dtype), layer=0)
        out, own = products(room)
        own = None if own is None else keep(own)
    else:
        out, stack = products(Kept(carried.kept, layer=offset // plan.group_sizes.shape[0]))
        own, carried = None, carried._replace(kept=stack)
    return (out, carried), (x, gates, weights, plan, offset, own)


def _backward(grouped: ModuleType, recompute: bool, saved: tuple, cotangents: tuple[Array, Carried]) -> tuple:
    x, gates, weights, plan, offset, own = saved
    d_out, carried = cotangents
    if carried.kept is None:
        kept = None if own is None else Kept(own, layer=0)
    else:
        kept = Kept(carried.kept, layer=offset // plan.group_sizes.shape[0])
    tokens, row_weights = _tokens_and_gates(grouped, gates, plan)
    d_rows, d_row_weights, masters = grouped.ffn_gradients(
        x, tokens, row_weights, d_out, weights, kept, plan.group_sizes, carried.masters, offset
    )
    M = gates.size
    d_gates = gather_slots(d_row_weights[:M], plan).astype(gates.dtype)
    return combine(d_rows[:M], plan), d_gates, None, carried._replace(masters=masters), None, None


expert_ffn_in_stack.defvjp(_forward, _backward)
