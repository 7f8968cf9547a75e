"""Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), in two forms of one function.

Training expands keys and values from the latent. Decoding keeps only the latent and the rotary key in its cache and
absorbs the expansion into the query and the output instead (the same product, associated the other way round).
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.kernels import choose_kernels
from jaxllm.model.kernels.causal_attention import masked_softmax
from jaxllm.model.layers import Linear, RotaryEmbedding


class Latents(NamedTuple):
    """What attention must remember of a token: R + H*h/2 numbers instead of the 2*D of full keys and values."""

    kv: Array  # (..., B,S,R)
    k_rope: Array  # (..., B,S,H,r), already rotated


class MultiHeadLatentAttention(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, platform: str | None = None):
        self.config, self.dtype = config, dtype
        self.kernels = choose_kernels(config, dtype, platform)
        D, R, H = config.hidden_size, config.latent_size, config.num_attention_heads

        def linear(in_features: int, out_features: int, *axes: str) -> Linear:
            return Linear(in_features, out_features, axes, std=config.initializer_range, dtype=dtype, rngs=rngs)

        self.kv_proj_d = linear(D, R, "hidden", "latent")
        self.q_proj_d = linear(D, R, "hidden", "latent")
        self.k_proj_u = linear(R, H * config.nope_head_dim, "latent", "heads")
        self.v_proj_u = linear(R, D, "latent", "heads")
        self.q_proj_u = linear(R, H * config.nope_head_dim, "latent", "heads")
        self.rope_k = linear(D, H * config.rope_head_dim, "hidden", "rotary")
        self.rope_q = linear(R, H * config.rope_head_dim, "latent", "heads")
        self.o_proj = linear(D, D, "context", "hidden")
        self.rotary_emb = RotaryEmbedding(config.rope_head_dim, theta=config.rope_theta)

    def latents(self, x: Array, positions: Array) -> Latents:  # (B,T,D), (B|1,T)
        return Latents(self.kv_proj_d(x), self.rotary_emb(self._heads(self.rope_k(x)), positions))

    def queries(self, x: Array, positions: Array) -> tuple[Array, Array]:  # -> (B,T,H,n), (B,T,H,r)
        latent = self.q_proj_d(x)  # (B,T,R)
        return self._heads(self.q_proj_u(latent)), self.rotary_emb(self._heads(self.rope_q(latent)), positions)

    def __call__(self, x: Array, positions: Array, attention_mask: Array | None) -> tuple[Array, Latents]:
        """Attend within x: (B,T,D), positions (B|1,T), mask (B,T) or None -> (B,T,D) and the latents to cache."""
        latents = self.latents(x, positions)
        q = jnp.concatenate(self.queries(x, positions), axis=-1)  # (B,T,H,h)
        k = jnp.concatenate([self._heads(self.k_proj_u(latents.kv)), latents.k_rope], axis=-1)
        v = self._heads(self.v_proj_u(latents.kv))
        context = self.kernels.attention(q, k, v, attention_mask)
        return self.o_proj(context.reshape(x.shape)), latents

    def attend_latents(self, x: Array, positions: Array, cache: Latents, mask: Array) -> Array:
        """Attend to cached latents without expanding them: (B,T,D), cache of (B,S,...), mask (B,1,T,S) -> (B,T,D)."""
        acc_dtype = at_least_float32(self.dtype)
        q_nope, q_rope = self.queries(x, positions)
        expand_k = self._per_head(self.k_proj_u)  # (R,H,n)
        expand_v = self._per_head(self.v_proj_u)  # (R,H,h)
        q_latent = jnp.einsum("bthn,Rhn->bthR", q_nope, expand_k)
        scores = jnp.einsum("bthR,bsR->bhts", q_latent, cache.kv, preferred_element_type=acc_dtype)
        scores += jnp.einsum("bthr,bshr->bhts", q_rope, cache.k_rope, preferred_element_type=acc_dtype)
        weights = masked_softmax(scores * self.config.head_dim**-0.5, mask).astype(self.dtype)
        context = jnp.einsum("bhts,bsR->bthR", weights, cache.kv)
        return self.o_proj(jnp.einsum("Rhd,bthR->bthd", expand_v, context).reshape(x.shape))

    def _heads(self, x: Array) -> Array:  # (B,T,H*d) -> (B,T,H,d)
        return x.reshape(*x.shape[:2], self.config.num_attention_heads, -1)

    def _per_head(self, linear: Linear) -> Array:  # (R,H*d) -> (R,H,d)
        weight = linear.weight[...].astype(self.dtype)
        return weight.reshape(weight.shape[0], self.config.num_attention_heads, -1)
