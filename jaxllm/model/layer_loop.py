"""The loop over the layers, and its backward pass: the only module that sees all layers' weights as arrays.

    forward     for layer i:            x, pullback = jax.vjp(layer, its weights, its experts, x);  save the pullback
    backward    for i, last to first:   d_weights[i], d_experts, d_x = pullback(d_x)

`layer` is an ordinary function of one layer. Most weights are sliced: a layer gets a copy of its part. The experts are
most of the weights, so they are not: a layer gets the arrays of all layers and its place in them (`ExpertSlice`), and
writes there its part of the gradient and of what it saves. The autodiff of a plain scan would copy both in each layer.

A layer's arguments are not saved with its pullback: the backward pass puts them in again. So a pullback gets the arrays
`gradient` and `saved` as all layers have written them by then, in place of those that it was traced with.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from jaxllm.model.attention import Latents
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.kernels import Kernels
from jaxllm.model.kernels.expert_ffn import ExpertSlice, expert_slice
from jaxllm.model.kernels.packed import pack, read, unpack
from jaxllm.model.layer import DecoderLayer, LayerInputs, LayerTrace
from jaxllm.model.layers import Frozen, parameter_facts
from jaxllm.model.layout import Layout, checkpoint
from jaxllm.model.pullback import with_arguments, without_arguments, without_integers

Experts = dict[str, ExpertSlice]


class LayerWeights(NamedTuple):
    """The weights of all layers as arrays."""

    frozen: Pytree  # (L,...), nested dict; without a gradient
    sliced: Pytree  # (L,...), nested dict
    experts: Experts  # (L*E,...), by the attribute of DeepSeekMoE

    @property
    def layers(self) -> int:
        return len(jax.tree.leaves((self.frozen, self.sliced))[0])

    def of_layer(self, i: Array) -> tuple[Pytree, Pytree, Experts]:
        """What layer i gets: slices, and its place in the arrays of all experts."""
        offsets = {name: i * (len(experts.weights[0]) // self.layers) for name, experts in self.experts.items()}
        experts = {name: self.experts[name]._replace(offset=at) for name, at in offsets.items()}
        return _at(self.frozen, i), _at(self.sliced, i), experts


def run_layers(
    layers: DecoderLayer,
    x: Float[Array, "B T D"],
    inputs: LayerInputs,
    record: Callable[[LayerTrace, Array | None], Pytree],
    layout: Layout,
    remat: bool,
) -> tuple[Float[Array, "B T D"], Pytree]:
    """Run all layers; returns the residual stream, and what `record` takes from each layer, (L,...).

    Args:
        layers: stacked.
        record: a function of no other arrays than a layer's trace and the attention mask.
        inputs: those of a layer, but `experts` are of all layers, (L,B,T,k).
        remat: compute each layer again in the backward pass; see `layout.checkpoint`.
    """
    # `fsdp` gathers all weights of a layer when it runs, so none stays in an array of all layers
    merge, facts, weights = _split(layers, in_place=layout.fsdp == 1)

    def layer(frozen: Pytree, sliced: Pytree, experts: Experts, inputs: LayerInputs, x: Array):
        module = merge(*layout.gather((frozen, sliced), facts))
        trace, saved = module(x, inputs=inputs, layout=layout, experts=experts or None)  # names for nnx.tabulate
        return (trace.residual, record(trace, inputs.attention_mask)), {name: saved[name] for name in experts}

    kernels = layers.kernels
    tokens, k = x.shape[0] * x.shape[1], layers.config.num_experts_per_tok
    sizes = {
        "routed_experts": (1, tokens * k * layout.expert),
        "shared_experts": (layers.config.n_shared_experts, tokens),
    }

    def new_saved() -> dict[str, Array | None]:
        if kernels.shared is None:  # each layer saves its own: see `Kernels.shared`
            return dict.fromkeys(weights.experts)
        made = {}
        for name, experts in weights.experts.items():
            (parts, rows), features = sizes[name], 2 * experts.weights[0].shape[2]
            made[name] = kernels.experts[name].new_saved(weights.layers * parts, rows, features, x.dtype)
        return made

    loop = _Loop(checkpoint(layer, remat), kernels, new_saved)
    return _run(loop, weights, inputs, x)


def decode_layers(
    stacks: Sequence[DecoderLayer], x: Float[Array, "B 1 D"], positions: Int[Array, "B 1"], cache: Latents
) -> tuple[Float[Array, "B 1 D"], Latents]:
    """Run the layers of several stacks on one token of each row, which attends to the cache of all of them.

    Returns the residual stream, and the cache with the token's latents in it.
    """
    packs = stacks[0].kernels.packs
    packed, first, new = pack(cache, packs), 0, []
    for layers in stacks:
        x, own = _decode_stack(layers, x, positions, packed, first)
        first += len(own.kv)
        new.append(own)
    row = jnp.arange(x.shape[0])

    def enter(slots: Array, *tokens: Array) -> Array:  # a token's slot is its position
        return slots.at[:, row, positions[:, 0]].set(jnp.concatenate(tokens)[:, :, 0])

    return x, unpack(jax.tree.map(enter, packed, *new), packs)


def _decode_stack(
    layers: DecoderLayer, x: Array, positions: Array, packed: Latents, first: int
) -> tuple[Array, Latents]:
    """Returns x, and the token's latents (L,B,1,...), packed like the cache, in which these layers begin at `first`."""
    merge, _, weights = _split(layers, in_place=True)
    without_gradient = {name: experts._replace(masters=None) for name, experts in weights.experts.items()}
    weights, packs = weights._replace(experts=without_gradient), layers.kernels.packs

    def body(x: Array, i: Array) -> tuple[Array, Latents]:
        *slices, experts = weights.of_layer(i)
        x, own = merge(*slices).decode(x, positions, unpack(_at(packed, first + i), packs), experts or None)
        return x, pack(own, packs)

    return jax.lax.scan(body, x, jnp.arange(weights.layers))


def _split(layers: DecoderLayer, in_place: bool) -> tuple[Callable[..., DecoderLayer], tuple, LayerWeights]:
    """Split layers into a function from frozen and sliced weights to one layer, the facts of both, and all weights.

    In that layer, the weights of experts that are read in place are NaN: nothing may read them.
    """
    names = [name for name in layers.kernels.experts if in_place and hasattr(layers.mlp, name)]
    read_in_place = nnx.All(nnx.Any(*map(nnx.PathContains, names)), nnx.Not(nnx.PathContains("adapter")))
    graph, others, frozen, sliced = nnx.split(layers, read_in_place, Frozen, ...)
    shapes = jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape[1:], weight.dtype), others)

    def merge(frozen: Pytree, sliced: Pytree) -> DecoderLayer:
        unread = jax.tree.map(lambda weight: jnp.full(weight.shape, jnp.nan, weight.dtype), shapes)
        return nnx.merge(graph, unread, frozen, sliced)

    def experts_of_all(name: str) -> ExpertSlice:
        module = getattr(layers.mlp, name)
        gate, up, down = (weight.reshape(-1, *weight.shape[2:]) for weight in module.weights())
        return expert_slice(layers.kernels.experts[name], (gate, up, down), layers.dtype, frozen=module.is_frozen)

    slices = (nnx.to_pure_dict(frozen), nnx.to_pure_dict(sliced))
    weights = LayerWeights(*slices, {name: experts_of_all(name) for name in names})
    return merge, (parameter_facts(frozen), parameter_facts(sliced)), weights


def _at(arrays: Pytree, i: Array) -> Pytree:  # (L,...) -> (...)
    return jax.tree.map(lambda array: read(array, i), arrays)


def _empty_like(array: Array) -> Array:
    return jax.lax.empty(array.shape, array.dtype)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What is static."""

    layer: Callable[[Pytree, Pytree, Experts, LayerInputs, Array], tuple[tuple[Array, Pytree], dict[str, Array | None]]]
    """-> (x, what is recorded), and `ExpertOutput.saved` of its experts. The first argument has no gradient."""
    kernels: Kernels
    new_saved: Callable[[], dict[str, Array | None]]

    def arguments(
        self, i: Array, weights: LayerWeights, inputs: LayerInputs, in_place: tuple[dict, dict] | None = None
    ) -> tuple[Pytree, Pytree, Experts, LayerInputs]:
        """Those of layer i before x; `in_place` are `gradient` and `saved` of its experts."""
        frozen, sliced, experts = weights.of_layer(i)
        if in_place is not None:
            gradient, saved = in_place
            experts = {name: e._replace(gradient=gradient[name], saved=saved[name]) for name, e in experts.items()}
        return frozen, sliced, experts, inputs._replace(experts=_at(inputs.experts, i))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(loop: _Loop, weights: LayerWeights, inputs: LayerInputs, x: Array) -> tuple[Array, Pytree]:
    def body(x: Array, i: Array) -> tuple[Array, Pytree]:
        (x, record), _ = loop.layer(*loop.arguments(i, weights, inputs), x)
        return x, pack(record, loop.kernels.packs)

    x, records = jax.lax.scan(body, x, jnp.arange(weights.layers))
    return x, unpack(records, loop.kernels.packs)


def _forward(loop: _Loop, weights: LayerWeights, inputs: LayerInputs, x: Array):
    def body(carry: tuple[Array, dict], i: Array):
        x, saved = carry
        # a placeholder for the gradient, which the backward pass substitutes
        empty = {name: jax.tree.map(_empty_like, of_all.masters) for name, of_all in weights.experts.items()}
        frozen, *others = arguments = loop.arguments(i, weights, inputs, in_place=(empty, saved))
        layer = functools.partial(loop.layer, frozen)
        (x, record), pullback, written = jax.vjp(layer, *others, x, has_aux=True)
        out = record, without_arguments(pullback, arguments, must_hold=(empty, saved))
        return (x, written), pack(out, loop.kernels.packs)

    (x, saved), out = jax.lax.scan(body, (x, loop.new_saved()), jnp.arange(weights.layers))
    records, pullbacks = out
    return (x, unpack(records, loop.kernels.packs)), (weights, inputs, saved, pullbacks)


def _backward(loop: _Loop, residuals: tuple, d: tuple[Array, Pytree]):
    weights, inputs, saved, pullbacks = residuals
    d_x, d_records = d
    d_floats, with_integers = without_integers(d_records)

    def body(carry: tuple[Array, dict], of_layer: tuple):
        (d_x, gradient), (i, pullback, d_floats) = carry, unpack(of_layer, loop.kernels.packs)
        arguments = loop.arguments(i, weights, inputs, in_place=(gradient, saved))
        d_sliced, d_experts, _, d_x = with_arguments(pullback, arguments)((d_x, with_integers(d_floats)))
        return (d_x, {name: e.masters for name, e in d_experts.items()}), d_sliced  # see `ExpertSlice.masters`

    gradient = {
        name: jax.tree.map(loop.kernels.routed.new_gradient, of_all.masters) for name, of_all in weights.experts.items()
    }
    of_layers = jnp.arange(weights.layers), pullbacks, pack(d_floats, loop.kernels.packs)
    (d_x, gradient), d_sliced = jax.lax.scan(body, (d_x, gradient), of_layers, reverse=True)
    none: Any = None  # the gradient of arrays that have none
    d_experts = {name: ExpertSlice(gradient[name], none, none) for name in gradient}
    return LayerWeights(none, d_sliced, d_experts), none, d_x


_run.defvjp(_forward, _backward)
