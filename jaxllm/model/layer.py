"""DecoderLayer: attention and a feed-forward network, with the residual stream around them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.model.attention import Latents, MultiHeadLatentAttention
from jaxllm.model.dtypes import Array
from jaxllm.model.kernels.packed import packed_like, unpack
from jaxllm.model.kernels.stacks import Carried
from jaxllm.model.layers import CustomRMSNorm
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.model.moe import DeepSeekExpertLayer, DeepSeekMoE, InStacks, Mixture, Routing


class LayerTrace(NamedTuple):
    """The outputs of the parts of a layer, in the order of the computation."""

    input_norm: Array  # (B,T,D)
    latents: Latents
    attention: Array  # (B,T,D)
    post_attn_norm: Array  # (B,T,D)
    routing: Routing | None  # None: the layer has no experts
    mixture: Array  # (B,T,D), the feed-forward network's output: shared and routed experts summed
    residual: Array  # (B,T,D), the residual stream after the layer


class LayerOutput(NamedTuple):
    trace: LayerTrace
    carried: dict[str, Carried]  # for the next layer


class DecoderLayer(nnx.Module):
    """Attention and a feed-forward network: experts, or with `dense` a single one."""

    def __init__(
        self, config: ModelConfig, dense: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs, platform: str | None = None
    ):
        options: Any = {"dtype": dtype, "rngs": rngs, "platform": platform}
        self.self_attn = MultiHeadLatentAttention(config, **options)
        if dense:
            self.mlp = DeepSeekExpertLayer(config, hidden=config.intermediate_size, **options)
        else:
            self.mlp = DeepSeekMoE(config, **options)
        self.input_norm = CustomRMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.post_attn_norm = CustomRMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        attention_mask: Array | None,
        experts: Array | None,
        layout: Layout,
        in_stacks: InStacks | None = None,
    ) -> LayerOutput:
        """(B,T,D) -> the residual stream (B,T,D), and the outputs of the parts before it."""
        normed = self.input_norm(x)
        attended, latents = self.self_attn(normed, positions, attention_mask)
        x = x + attended
        normed_again = self.post_attn_norm(x)
        mixed, routing, carried = self.feed_forward(normed_again, experts, layout, in_stacks=in_stacks)
        trace = LayerTrace(normed, latents, attended, normed_again, routing, mixed, residual=x + mixed)
        return LayerOutput(trace, carried)

    def feed_forward(
        self, x: Array, experts: Array | None = None, layout: Layout = ONE_DEVICE, in_stacks: InStacks | None = None
    ) -> Mixture:  # arguments as in DeepSeekMoE
        if isinstance(self.mlp, DeepSeekMoE):
            return self.mlp(x, experts, layout, in_stacks=in_stacks)
        return Mixture(self.mlp(x), routing=None, carried={})

    def decode(
        self, x: Array, positions: Array, cache: Latents, layer: Array, in_stacks: InStacks
    ) -> tuple[Array, Latents]:
        """One token of each row on the cache of all layers (L,B,S,...): (B,1,D), positions (B,1) -> (B,1,D), cache.

        A token's cache slot is its position, so a row attends to the slots up to this position. The routed experts are
        those of all layers.
        """
        normed = self.input_norm(x)
        row = jnp.arange(x.shape[0])
        new = self.self_attn.latents(normed, positions)
        cache = jax.tree.map(
            lambda slots, token: slots.at[layer, row, positions[:, 0]].set(packed_like(token[:, 0], slots)), cache, new
        )
        mask = jnp.arange(cache.kv.shape[2]) <= positions[:, :, None]  # (B,1,S)
        local = jax.tree.map(lambda slots: unpack(slots[layer]), cache)
        x = x + self.self_attn.attend_latents(normed, positions, local, mask[:, None])
        return x + self.feed_forward(self.post_attn_norm(x), in_stacks=in_stacks).output, cache
