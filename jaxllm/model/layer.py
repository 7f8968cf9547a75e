"""DecoderLayer: attention and a feed-forward network, with the residual stream around them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int, Shaped

from jaxllm.config import ModelConfig
from jaxllm.model.attention import Latents, MultiHeadLatentAttention
from jaxllm.model.dtypes import Array
from jaxllm.model.kernels import Kernels
from jaxllm.model.layers import CustomRMSNorm
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.model.moe import DeepSeekExpertLayer, DeepSeekMoE, ExpertSlices, Mixture, Routing


class LayerInputs(NamedTuple):
    """What a layer needs besides its weights and the residual stream; it has no gradient."""

    positions: Int[Array, "#B T"]
    attention_mask: Shaped[Array, "B T"] | None  # each token's document, zero at padding; None: no padding
    experts: Int[Array, "*L B T k"] | None  # experts to use instead of the router's choice


class LayerTrace(NamedTuple):
    """The outputs of the parts of a layer, in the order of the computation."""

    input_norm: Float[Array, "B T D"]
    latents: Latents
    attention: Float[Array, "B T D"]
    post_attn_norm: Float[Array, "B T D"]
    routing: Routing | None  # None: the layer has no experts
    mixture: Float[Array, "B T D"]  # the feed-forward network's output: shared and routed experts summed
    residual: Float[Array, "B T D"]  # the residual stream after the layer


class LayerOutput(NamedTuple):
    trace: LayerTrace
    saved: dict[str, Array | None]  # of the experts, see `Mixture`


class DecoderLayer(nnx.Module):
    """Attention and a feed-forward network: experts, or with `dense` a single one."""

    def __init__(self, config: ModelConfig, dense: bool, *, kernels: Kernels, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.kernels, self.dtype = config, kernels, dtype
        self.self_attn = MultiHeadLatentAttention(config, kernels=kernels, dtype=dtype, rngs=rngs)
        if dense:
            self.mlp = DeepSeekExpertLayer(config, hidden=config.intermediate_size, dtype=dtype, rngs=rngs)
        else:
            self.mlp = DeepSeekMoE(config, kernels=kernels, dtype=dtype, rngs=rngs)
        self.input_norm = CustomRMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.post_attn_norm = CustomRMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: LayerInputs,
        layout: Layout = ONE_DEVICE,
        experts: ExpertSlices | None = None,
    ) -> LayerOutput:
        """One layer on the residual stream x; `layout` and `experts` as in `DeepSeekMoE`."""
        normed = self.input_norm(x)
        attended, latents = self.self_attn(normed, inputs.positions, inputs.attention_mask)
        x = x + attended
        normed_again = self.post_attn_norm(x)
        mixed, routing, saved = self.feed_forward(normed_again, inputs.experts, layout, experts)
        trace = LayerTrace(normed, latents, attended, normed_again, routing, mixed, residual=x + mixed)
        return LayerOutput(trace, saved)

    def feed_forward(
        self,
        x: Float[Array, "B T D"],
        forced: Int[Array, "B T k"] | None = None,
        layout: Layout = ONE_DEVICE,
        experts: ExpertSlices | None = None,
    ) -> Mixture:
        """The experts, or the dense network; arguments as in `DeepSeekMoE`."""
        if isinstance(self.mlp, DeepSeekMoE):
            return self.mlp(x, forced, layout, experts)
        return Mixture(self.mlp(x), routing=None, saved={})

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        positions: Int[Array, "B 1"],
        cached: Latents,
        experts: ExpertSlices | None = None,
    ) -> tuple[Float[Array, "B 1 D"], Latents]:
        """One token of each row, and this layer's cache.

        A token's cache slot is its position. A row attends to the slots before it and to the token itself, whose
        latents are returned and not yet in the cache.
        """
        normed = self.input_norm(x)
        own = self.self_attn.latents(normed, positions)
        slots = jnp.arange(cached.kv.shape[1])  # (S,)

        def with_own(before: Array, token: Array) -> Array:
            is_own = (slots == positions).reshape(*before.shape[:2], *[1] * (before.ndim - 2))
            return jnp.where(is_own, token, before)

        mask = slots <= positions[:, :, None]  # (B,1,S)
        x = x + self.self_attn.attend_latents(normed, positions, jax.tree.map(with_own, cached, own), mask[:, None])
        return x + self.feed_forward(self.post_attn_norm(x), experts=experts).output, own
