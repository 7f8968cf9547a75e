"""The feed-forward networks of a layer's experts, from tokens to tokens, with an explicit gradient. No row is dropped.

Each token goes through k experts. The output is the sum of their SwiGLU networks, each times its gate. A device's
kernels (`ExpertKernels`) compute both passes, which autodiff cannot differentiate. They read each row directly from the
tokens, so no sorted copy is written. All other moves of rows are gathers; autodiff would use scatters in the backward
pass.

A gate multiplies before the last product: so its gradient does not need the experts' outputs. The two pre-activations
(2*M*F numbers) are saved for the backward pass, which avoids a quarter of its products, or computed again there.

    N tokens    k experts of each    M rows, sorted by expert    D hidden    F expert hidden
    E experts of a layer, of S in an array (not key slots, as elsewhere)    L layers
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.kernels.interface import Adapters, ExpertKernels, ExpertRows, Saved, Weights
from jaxllm.model.kernels.matmul import save_for_backward
from jaxllm.model.kernels.token_dispatch import Dispatch, add_all, combine, gather_slots


class ExpertSlice(NamedTuple):
    """The experts of one layer: E of S, which are those of all layers when a loop runs the layers.

    If each layer returned a gradient of the whole arrays, L arrays of that size would be made and added. So the loop
    hands the same arrays, `gradient` and `saved`, from layer to layer, and each writes its part of them in place.
    """

    masters: Weights | tuple[()] | None  # in float32 or wider; their gradient is `gradient` with its part written
    # (): the weights are frozen, and have no gradient; None: nothing has, in decoding
    weights: Weights  # the masters as the kernels read them; without a gradient
    offset: Array | int  # () int, the first of the E experts
    gradient: Weights | tuple[()] | None = None  # the layers after this one have written theirs; None: a new one
    saved: Array | None = None  # (L,M,2F) pre-activations, for the backward pass; None: this layer saves its own
    adapters: Adapters | None = None  # of the E experts, which are then frozen


class ExpertOutput(NamedTuple):
    output: Array  # (N,D)
    saved: Array | None  # `ExpertSlice.saved` with this layer's part written


def expert_slice(kernels: ExpertKernels, masters: Weights, dtype: jnp.dtype, frozen: bool = False) -> ExpertSlice:
    """Experts, all of which belong to one layer, for products in this dtype; of `frozen` ones nothing is trained."""
    weights: Weights = jax.tree.map(lambda weight: kernels.prepared(jax.lax.stop_gradient(weight), dtype), masters)
    return ExpertSlice(() if frozen else masters, weights, offset=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn(kernels: ExpertKernels, x: Array, gates: Array, plan: Dispatch, experts: ExpertSlice) -> ExpertOutput:
    """The sum of `(gates[n,j] * silu(x[n] @ gate[e]) * (x[n] @ up[e])) @ down[e]` over the chosen experts e of a token.

    Args:
        x: (N, D), in the compute dtype.
        gates: (N, k), in float32 or wider.
        plan: the experts' rows. Slots of other devices contribute nothing, and have no gradient. If all tokens go
            through all experts (`dispatch.every_token`), k is their number.
        experts: used once in a pass, since the backward pass writes into `experts.gradient`.

    The weights' gradients have the masters' dtype.
    """
    outputs = (_ffn(kernels, rows, plan, None).output for rows in _passes(kernels, x, gates, plan, experts))
    return ExpertOutput(add_all(outputs), experts.saved)


def _passes(
    kernels: ExpertKernels, x: Array, gates: Array, plan: Dispatch, experts: ExpertSlice
) -> Iterator[ExpertRows]:
    """The kernels' operands: of all routed experts at once, or of one shared expert at a time."""
    if plan.order is None:
        for j in range(gates.shape[1]):
            yield ExpertRows(x, None, gates[:, j : j + 1], plan.group_sizes, experts.weights, experts.offset + j)
        return  # shared experts with adapters are computed elsewhere
    slots = jnp.pad(plan.order, (0, kernels.padding(plan.order.size)))
    tokens, row_weights = slots // gates.shape[1], gates.reshape(-1)[slots][:, None]
    yield ExpertRows(x, tokens, row_weights, plan.group_sizes, experts.weights, experts.offset, experts.adapters)


def _ffn(kernels: ExpertKernels, rows: ExpertRows, plan: Dispatch, saved: Saved | None) -> ExpertOutput:
    out, written = kernels.ffn(rows, saved)
    return ExpertOutput(combine(out[: _count(rows, plan)], plan), written)


def _count(rows: ExpertRows, plan: Dispatch) -> int:
    """M, without padding; symbolic in `jax.export`, where `len` fails."""
    return (rows.x if plan.order is None else plan.order).shape[0]


def _part(saved: Array, rows: ExpertRows) -> Saved:
    """The layer's part of what all layers save; each shared expert has a part of its own."""
    return Saved(saved, layer=rows.offset // rows.group_sizes.shape[0])


def _forward(kernels: ExpertKernels, x: Array, gates: Array, plan: Dispatch, experts: ExpertSlice):
    if experts.masters is None:
        raise ValueError("decoding has no gradient: differentiate the model's call, which takes whole sequences")
    outputs, own, written = [], [], experts.saved
    for rows in _passes(kernels, x, gates, plan, experts):
        if written is not None:
            output, written = _ffn(kernels, rows, plan, _part(written, rows))
        elif kernels.recomputes:
            output, _ = _ffn(kernels, rows, plan, None)
        else:
            features = 2 * experts.weights[0].shape[2]
            room = Saved(kernels.new_saved(1, _count(rows, plan), features, x.dtype), layer=0)
            output, made = _ffn(kernels, rows, plan, room)
            own.append(jax.tree.map(save_for_backward, made))
        outputs.append(output)
    # `experts` as given: in the backward pass, the layer loop puts the arrays that all layers wrote in their place
    return ExpertOutput(add_all(outputs), written), (x, gates, plan, experts, own)


def _backward(kernels: ExpertKernels, residuals: tuple, d: ExpertOutput) -> tuple[Array, Array, None, ExpertSlice]:
    x, gates, plan, experts, own = residuals
    gradient, d_x, d_gates = experts.gradient, [], []
    if experts.adapters is not None:
        gradient = jax.tree.map(kernels.new_gradient, experts.adapters)
    elif gradient is None:
        gradient = jax.tree.map(kernels.new_gradient, experts.masters)
    for j, rows in enumerate(_passes(kernels, x, gates, plan, experts)):
        saved = Saved(own[j], layer=0) if own else None if experts.saved is None else _part(experts.saved, rows)
        d_rows, d_row_weights, gradient = kernels.ffn_gradients(rows, d.output, saved, gradient)
        M = _count(rows, plan)
        d_x.append(combine(d_rows[:M], plan))
        d_gates.append(gather_slots(d_row_weights[:M], plan).astype(gates.dtype))
    none: Pytree = None  # the gradient of arrays that have none
    d_experts = ExpertSlice(gradient, none, none)
    if experts.adapters is not None:
        d_experts = ExpertSlice((), none, none, adapters=gradient)
    return add_all(d_x), jnp.concatenate(d_gates, axis=1), None, d_experts


expert_ffn.defvjp(_forward, _backward)
