"""CustomLLM: the whole model, its layers stacked along a leading axis and run under a scan.

There are two stacks: the first layers, which may have a dense feed-forward network, and the others with experts.
"""

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.errors import InconclusiveDimensionOperation
from jax.export import is_symbolic_dim
from jaxtyping import Float, Int, Key, Shaped

from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.model.adapters import add_adapters
from jaxllm.model.attention import Latents
from jaxllm.model.dtypes import Array, DTypeLike, Pytree, at_least_float32, check_dtype
from jaxllm.model.kernels import choose_kernels
from jaxllm.model.kernels.matmul import linear
from jaxllm.model.layer import DecoderLayer, LayerInputs, LayerTrace
from jaxllm.model.layer_loop import decode_layers, run_layers
from jaxllm.model.layers import CustomRMSNorm, Embedding, Frozen, Linear, RoutingBias, parameter_facts, stack
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.model.load_balance import balance_loss, expert_counts, z_loss

STACKS = ("dense_layers", "decoder_layers")
"""The attributes of a model that are stacks of layers, in their order; a stack without layers is None."""


class LayerAux(NamedTuple):
    """Auxiliary outputs of the layers, stacked. The last two are None unless requested.

    Those of a router (counts, losses and the trace's routing) are of the layers with experts alone.
    """

    counts: Int[Array, "L E"]  # tokens of each expert
    balance_loss: Float[Array, " L"]
    z_loss: Float[Array, " L"]
    latents: Latents | None  # to fill a cache
    trace: LayerTrace | None  # (L,...), to compare


class HiddenStates(NamedTuple):
    last: Float[Array, "B T D"]  # before any final norm
    aux: LayerAux


class CustomLLM(nnx.Module):
    """Decoder-only language model with Multi-head Latent Attention and DeepSeekMoE.

    Args:
        config: the model's shape.
        dtype: compute dtype, float32 or bfloat16 (float64 with jax_enable_x64). Weights are float32 masters.
        remat: compute each layer again in the backward pass; see `layout.checkpoint`.
        lora: its adapters (`jaxllm.model.adapters`), which are then all that is trained; None: none.
        rngs: for the initialization.
        platform: whose kernels to use (`kernels.choose_kernels`); None: those of the default device.
        without: kernels that must have their plain form (`kernels.REPLACEABLE`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
        platform: str | None = None,
        without: Collection[str] = (),
    ):
        dtype = check_dtype(dtype)
        self.config, self.dtype, self.remat, self.lora = config, dtype, remat, lora
        self.kernels = choose_kernels(config, dtype, platform, remat=remat, lora=lora, without=without)
        D, V, std = config.hidden_size, config.vocab_size, config.initializer_range
        positions = config.max_position_embeddings
        init: Any = {"std": std, "dtype": dtype, "rngs": rngs}
        self.token_embeddings = Embedding(V, D, "vocab", **init)
        self.position_embeddings = Embedding(positions, D, "position", **init) if config.learned_positions else None
        self.dropout = nnx.Dropout(config.dropout)

        def layers(count: int, dense: bool) -> DecoderLayer | None:
            def layer(rngs: nnx.Rngs) -> DecoderLayer:
                return DecoderLayer(config, dense, kernels=self.kernels, dtype=dtype, rngs=rngs)

            return stack(layer, count, "layer", rngs) if count else None

        self.dense_layers = layers(config.dense_layers, True)
        self.decoder_layers = layers(config.moe_layers, False)
        self.final_norm = CustomRMSNorm(D, eps=config.rms_norm_eps, dtype=dtype) if config.final_norm else None
        head = (
            None if config.tie_word_embeddings else Linear(D, V, ("hidden", "vocab"), bias=config.lm_head_bias, **init)
        )
        self.lm_head = head  # None: the table of token embeddings
        if lora is not None:
            add_adapters(self, config, lora, rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Shaped[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, in float32 (float64 in a float64 model).

        Args:
            attention_mask: zero at padding, whose logits have no meaning; None: no padding. Numbers other than 0 and 1
                are those of documents that do not see each other, rising along a row; each begins at position 0.
            rngs: the `dropout` stream in training; None: no dropout.
        """
        keys = None if rngs is None else jax.random.split(rngs.dropout(), input_ids.shape[0])
        return self.logits(self.hidden_states(input_ids, attention_mask, dropout_keys=keys).last)

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Shaped[Array, "B T"] | None = None,
        *,
        dropout_keys: Key[Array, " B"] | None = None,
        experts: Int[Array, "L B T k"] | None = None,
        keep_latents: bool = False,
        keep_trace: bool = False,
        layout: Layout = ONE_DEVICE,
    ) -> HiddenStates:
        """Everything before the final norm and `lm_head`.

        Args:
            input_ids, attention_mask: as in `__call__`.
            dropout_keys: one for each row, whose dropout does not depend on its device. None: no dropout.
            experts: to use instead of the router's choice, of the layers that have experts.
            keep_latents, keep_trace: return the latents, to fill a decoding cache; the outputs of all parts of layers.
            layout: of the step's devices, over which the weights are sharded.
        """
        check_inputs(self.config, input_ids, attention_mask)
        positions = token_positions(input_ids, attention_mask)
        x = self.embed(input_ids, positions)
        if dropout_keys is not None:
            x = jax.vmap(lambda row, key: self.dropout(row, rngs=key))(x, dropout_keys)
        record, records = functools.partial(_record, self.config, keep_latents, keep_trace), []
        for layers in self.stacks:
            inputs = LayerInputs(positions, attention_mask, experts if layers is self.decoder_layers else None)
            x, of_layers = run_layers(layers, x, inputs, record, layout, self.remat)
            records.append(of_layers)
        return HiddenStates(x, _joined(records, self.config.n_routed_experts))

    def decode(
        self, token: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: Latents
    ) -> tuple[Float[Array, "B 1 V"], Latents]:
        """Logits after one more token of each row, and the cache of all layers with it."""
        x, cache = decode_layers(self.stacks, self.embed(token, positions), positions, cache)
        return self.logits(x), cache

    @property
    def stacks(self) -> list[DecoderLayer]:
        """The layers in their order: the dense ones stacked, and those with experts."""
        return [layers for layers in (self.dense_layers, self.decoder_layers) if layers is not None]

    @property
    def is_frozen(self) -> bool:
        """Whether adapters alone are trained."""
        return isinstance(self.token_embeddings.weight, Frozen)

    def embed(self, input_ids: Int[Array, "B T"], positions: Int[Array, "#B T"]) -> Float[Array, "B T D"]:
        x = self.token_embeddings(input_ids)
        return x if self.position_embeddings is None else x + self.position_embeddings(positions)

    def apply_final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The input of lm_head: normed if the config has a final norm."""
        return x if self.final_norm is None else self.final_norm(x)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        weight, bias = self.head()
        logits = linear(self.apply_final_norm(x).astype(self.dtype), weight, at_least_float32(self.dtype))
        return logits if bias is None else logits + bias

    def head(self) -> tuple[Float[Array, "D V"], Float[Array, " V"] | None]:
        """The weight and the bias of the output layer, as float32 masters."""
        if self.lm_head is None:
            return self.token_embeddings.weight[...].T, None
        return self.lm_head.weight[...], None if self.lm_head.bias is None else self.lm_head.bias[...]


def token_positions(input_ids: Int[Array, "B T"], attention_mask: Shaped[Array, "B T"] | None) -> Int[Array, "#B T"]:
    """The position of each token in its document, without padding; the mask as in `CustomLLM.__call__`."""
    if attention_mask is None:
        return jnp.arange(input_ids.shape[1])[None]
    documents = attention_mask.astype(jnp.int32)
    index = jnp.cumsum(documents > 0, axis=-1, dtype=jnp.int32) - 1  # among the tokens that are not padding
    before = jax.lax.cummax(jnp.pad(documents, ((0, 0), (1, 0)))[:, :-1], axis=1)
    first = jax.lax.cummax(jnp.where(documents > before, index, 0), axis=1)  # of the document
    return jnp.maximum(index - first, 0)


def _record(
    config: ModelConfig, keep_latents: bool, keep_trace: bool, trace: LayerTrace, attention_mask: Array | None
) -> LayerAux:
    """What is returned of one layer. Padding is in no figure of a router."""
    routing: Any = trace.routing
    return LayerAux(
        counts=routing and expert_counts(routing, config.n_routed_experts, attention_mask),
        balance_loss=routing and balance_loss(routing, trace.residual.shape[0], attention_mask),
        z_loss=routing and z_loss(routing, attention_mask),
        latents=trace.latents if keep_latents else None,
        trace=trace if keep_trace else None,
    )


def _joined(records: Sequence[LayerAux], n_experts: int) -> LayerAux:
    """The auxiliary outputs of all stacks, in the order of the layers."""

    def join(*stacks):
        there = [stack for stack in stacks if stack is not None]
        return jnp.concatenate(there) if len(there) > 1 else there[0] if there else None

    record = jax.tree.map(join, *records, is_leaf=lambda x: x is None)
    if record.counts is None:  # no layer has experts
        nothing = jnp.zeros((0,))
        record = record._replace(counts=jnp.zeros((0, n_experts), jnp.int32), balance_loss=nothing, z_loss=nothing)
    return record


def check_inputs(config: ModelConfig, input_ids: Array, attention_mask: Array | None) -> None:
    """Check the shapes, which are always known, and outside jit the tokens: JAX would read another row of a table.

    Raises:
        ValueError: the model has no row for a token or a position, or the shapes do not fit.
    """
    shape, limit, V = jnp.shape(input_ids), config.max_position_embeddings, config.vocab_size
    if len(shape) != 2 or not all(isinstance(size, int) or is_symbolic_dim(size) for size in shape):
        raise ValueError(f"input_ids has the shape {shape}: it must be (batch, time), two numbers")
    try:
        too_long = shape[1] > limit
    except InconclusiveDimensionOperation:
        raise ValueError(
            f"input_ids has {shape[1]} tokens in a row: for jax.export, declare constraints=['{shape[1]} <= {limit}']"
        ) from None
    if too_long:
        raise ValueError(f"input_ids has {shape[1]} tokens in a row: max_position_embeddings = {limit} is the most")
    if attention_mask is not None and jnp.shape(attention_mask) != shape:
        raise ValueError(
            f"attention_mask has the shape {jnp.shape(attention_mask)}: it must be that of input_ids, {shape}"
        )
    if not isinstance(input_ids, Tracer) and math.prod(shape):
        ids = np.asarray(input_ids)  # a constant of a traced function too
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= V:
            token = lowest if lowest < 0 else highest
            raise ValueError(f"input_ids has the token {token}: it must be from 0 to vocab_size - 1 = {V - 1}")


def split_model(model: CustomLLM) -> tuple[nnx.GraphDef, Pytree, Pytree]:
    """A model as its static part, its parameters and its routing bias: plain nested dicts of arrays."""
    graph, params, bias = nnx.split(model, nnx.Param, RoutingBias)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(bias)


class AdaptedModel(NamedTuple):
    """A model with adapters as its static part and nested dicts of arrays."""

    graph: nnx.GraphDef
    params: Pytree  # the adapters
    routing_bias: Pytree
    frozen: Pytree  # all other weights


def split_adapted(model: CustomLLM) -> AdaptedModel:
    """`split_model` of a model with adapters."""
    graph, *states = nnx.split(model, nnx.Param, RoutingBias, Frozen)
    return AdaptedModel(graph, *map(nnx.to_pure_dict, states))


def abstract_adapted(config: ModelConfig, lora: LoraConfig, **options) -> AdaptedModel:
    """`split_adapted` with shapes in place of arrays."""
    return split_adapted(nnx.eval_shape(lambda: CustomLLM(config, lora=lora, rngs=nnx.Rngs(0), **options)))


def abstract_model(config: ModelConfig, **options) -> tuple[nnx.GraphDef, Pytree, Pytree]:
    """`split_model` with shapes in place of arrays: takes no memory."""
    return split_model(nnx.eval_shape(lambda: CustomLLM(config, rngs=nnx.Rngs(0), **options)))


@functools.cache
def model_facts(config: ModelConfig, lora: LoraConfig | None = None) -> tuple[Pytree, Pytree]:
    """The facts of the parameters and of the routing bias, as nested dicts like those of `split_model`.

    With `lora` the parameters are the adapters; the facts of the frozen weights are those of a model without them.
    """
    model = nnx.eval_shape(lambda: CustomLLM(config, lora=lora, rngs=nnx.Rngs(0)))
    return parameter_facts(nnx.state(model, nnx.Param)), parameter_facts(nnx.state(model, RoutingBias))


def count_parameters(params: Pytree) -> int:
    """Trained parameters, arrays or shapes; the routing bias is state and does not count."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
