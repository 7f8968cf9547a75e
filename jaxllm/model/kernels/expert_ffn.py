"""The routed experts of a layer, from tokens to tokens, with an explicit gradient. No row is dropped.

Each token goes to k experts, its gate times their SwiGLU network, and the results are summed. The passes over the
experts are those of a device's kernels (`grouped_loop`, `grouped_triton`), which autodiff cannot differentiate. They
read a token's row where the tokens are, so sorted rows are not written, and all other moves of rows are gathers; JAX
would scatter in the backward pass.

A gate multiplies before the last product: so its gradient does not need the experts' outputs. The backward pass keeps
the two pre-activations (2*M*F numbers), which saves a quarter of its products, and recomputes the rest.

    N tokens    k experts of each    M rows, sorted by expert    D hidden    F expert hidden
    E experts of a layer    S of a stack    L layers
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.kernels.dispatch import Dispatch, combine, of_slots
from jaxllm.model.kernels.matmul import product
from jaxllm.model.kernels.stacks import Carried, Kept, Weights


def expert_ffn(grouped: ModuleType, x: Array, gates: Array, masters: Weights, plan: Dispatch) -> Array:
    """The sum of `(gates[n,j] * silu(x[n] @ gate[e]) * (x[n] @ up[e])) @ down[e]` over the chosen experts e of a token.

    Args:
        grouped: the kernels, `Kernels.grouped`.
        x: (N, D), in the compute dtype.
        gates: (N, k), in float32 or wider.
        masters: gate, up (E,D,F) and down (E,F,D).
        plan: the experts' rows. Slots of other devices contribute nothing, and have no gradient.

    Returns (N, D). The weights' gradients accumulate in float32 (or wider) and are returned in the masters' dtype.
    """
    weights, carried = prepare(grouped, masters, x.dtype), Carried(masters, kept=None)
    made: Any = expert_ffn_in_stack(grouped, x, gates, weights, carried, plan, 0)
    return made[0]


def prepare(grouped: ModuleType, masters: Pytree, dtype: jnp.dtype) -> Pytree:
    """Masters as `expert_ffn_in_stack` reads them in this compute dtype. They have no gradient."""
    return jax.tree.map(lambda weight: grouped.prepared(jax.lax.stop_gradient(weight), dtype), masters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn_in_stack(
    grouped: ModuleType, x: Array, gates: Array, weights: Weights, carried: Carried, plan: Dispatch, offset: Array | int
) -> tuple[Array, Carried]:
    """`expert_ffn` by the E experts that begin at `offset` in a stack of S, without a copy of any.

    Args:
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
    tokens, row_weights = _rows(grouped, gates, plan)
    out, stack = grouped.ffn(x, tokens, row_weights, weights, plan.group_sizes, offset, kept)
    return combine(out[: gates.size], plan), stack


def _rows(grouped: ModuleType, gates: Array, plan: Dispatch) -> tuple[Array | None, Array]:
    """The token, (P,), and the gate, (P,1), of each row, with those of the padding that the kernels ask for."""
    if plan.order is None:
        return None, gates
    slots = jnp.pad(plan.order, (0, grouped.padding(plan.order.size)))
    return slots // gates.shape[1], gates.reshape(-1)[slots][:, None]


def _forward(
    grouped: ModuleType, x: Array, gates: Array, weights: Weights, carried: Carried, plan: Dispatch, offset: Array | int
):
    if carried.masters is None:
        raise ValueError("decoding has no gradient: differentiate the model's call, which takes whole sequences")
    products = functools.partial(_products, grouped, x, gates, weights, plan, offset)
    if carried.kept is None:
        room = grouped.new_kept(1, gates.size, 2 * weights[0].shape[2], x.dtype)
        out, own = products(Kept(room, layer=0))
        own = product(own)
    else:
        out, stack = products(Kept(carried.kept, layer=offset // plan.group_sizes.shape[0]))
        own, carried = None, carried._replace(kept=stack)
    return (out, carried), (x, gates, weights, plan, offset, own)


def _backward(grouped: ModuleType, saved: tuple, cotangents: tuple[Array, Carried]) -> tuple:
    x, gates, weights, plan, offset, own = saved
    d_out, carried = cotangents
    if own is None:
        assert carried.kept is not None  # as in the forward pass
        kept = Kept(carried.kept, layer=offset // plan.group_sizes.shape[0])
    else:
        kept = Kept(own, layer=0)
    tokens, row_weights = _rows(grouped, gates, plan)
    d_rows, d_row_weights, masters = grouped.ffn_gradients(
        x, tokens, row_weights, d_out, weights, kept, plan.group_sizes, carried.masters, offset
    )
    M = gates.size
    d_gates = of_slots(d_row_weights[:M], plan).astype(gates.dtype)
    return combine(d_rows[:M], plan), d_gates, None, carried._replace(masters=masters), None, None


expert_ffn_in_stack.defvjp(_forward, _backward)
