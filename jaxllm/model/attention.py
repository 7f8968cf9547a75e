"""Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), in two forms of one function.

Training expands keys and values from the latent. Decoding keeps only the latent and the rotary key in its cache and
absorbs the expansion into the query and the output instead (the same product, associated the other way round).
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int, Shaped

from jaxllm.config import ModelConfig
from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.kernels import Kernels
from jaxllm.model.kernels.causal_attention import masked_softmax
from jaxllm.model.kernels.matmul import in_dtype, save_for_backward
from jaxllm.model.layers import CustomRMSNorm, Linear, RotaryEmbedding


class Latents(NamedTuple):
    """What attention must remember of a token: R + G*r numbers instead of full keys and values."""

    kv: Float[Array, "*L B S R"]  # after its norm where it has one
    k_rope: Float[Array, "*L B S G r"]  # already rotated


class Attended(NamedTuple):
    output: Float[Array, "B T D"]
    latents: Latents  # to cache


class MultiHeadLatentAttention(nnx.Module):
    """Multi-head Latent Attention; queries and keys have a part without a position (nope) and a rotary one (rope)."""

    def __init__(self, config: ModelConfig, *, kernels: Kernels, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.kernels, self.dtype = config, kernels, dtype
        D, R, Q, H = config.hidden_size, config.kv_latent_size, config.q_latent_size, config.num_attention_heads
        queries = (Q, "latent", "heads") if Q else (D, "hidden", "query")  # what queries are made of, and the axes

        def linear(in_features: int, out_features: int, *axes: str, bias: bool = False) -> Linear:
            std = config.initializer_range
            return Linear(in_features, out_features, axes, bias=bias, std=std, dtype=dtype, rngs=rngs)

        def latent_norm(features: int) -> CustomRMSNorm | None:
            if not (features and config.latent_norm):
                return None
            return CustomRMSNorm(features, eps=config.latent_norm_eps, dtype=dtype)

        self.kv_proj_d = linear(D, R, "hidden", "latent", bias=config.attention_bias)
        self.q_proj_d = linear(D, Q, "hidden", "latent", bias=config.attention_bias) if Q else None
        self.k_proj_u = linear(R, H * config.nope_head_dim, "latent", "heads")
        self.v_proj_u = linear(R, H * config.value_head_dim, "latent", "heads")
        self.q_proj_u = linear(queries[0], H * config.nope_head_dim, *queries[1:])
        rotary = config.rope_key_heads * config.rope_head_dim
        self.rope_k = linear(D, rotary, "hidden", "rotary", bias=config.attention_bias)
        self.rope_q = linear(queries[0], H * config.rope_head_dim, *queries[1:])
        self.o_proj = linear(H * config.value_head_dim, D, "context", "hidden", bias=config.attention_bias)
        self.kv_norm, self.q_norm = latent_norm(R), latent_norm(Q)
        self.rotary_emb = RotaryEmbedding(config)

    def latents(self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]) -> Latents:
        kv = self.kv_proj_d(x)
        k_rope = self.rope_k(x).reshape(*x.shape[:2], self.config.rope_key_heads, -1)
        return Latents(kv if self.kv_norm is None else self.kv_norm(kv), self.rotary_emb(k_rope, positions))

    def queries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> tuple[Float[Array, "B T H n"], Float[Array, "B T H r"]]:
        latent = x if self.q_proj_d is None else self.q_proj_d(x)  # (B,T,Q)
        if self.q_norm is not None:
            latent = self.q_norm(latent)
        return self._heads(self.q_proj_u(latent)), self.rotary_emb(self._heads(self.rope_q(latent)), positions)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], attention_mask: Shaped[Array, "B T"] | None
    ) -> Attended:
        """Attend within x."""
        latents = self.latents(x, positions)
        q_nope, q_rope = self.queries(x, positions)
        q = save_for_backward(jnp.concatenate([q_nope, q_rope], axis=-1))  # (B,T,H,n+r)
        k_rope = jnp.broadcast_to(latents.k_rope, q_rope.shape)
        k_nope = self._heads(self.k_proj_u(latents.kv))
        k = save_for_backward(jnp.concatenate([k_nope, k_rope], axis=-1))
        v = self._heads(self.v_proj_u(latents.kv))
        context = self.kernels.attention(q, k, v, attention_mask, self.config.softmax_scale)  # (B,T,H,v)
        return Attended(self.o_proj(context.reshape(*x.shape[:2], -1)), latents)

    def attend_latents(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], cache: Latents, mask: Bool[Array, "B 1 T S"]
    ) -> Float[Array, "B T D"]:
        """Attend to the cached latents of one layer without expanding them."""
        acc_dtype = at_least_float32(self.dtype)
        q_nope, q_rope = self.queries(x, positions)
        expand_k = self._per_head(self.k_proj_u)  # (R,H,n)
        expand_v = self._per_head(self.v_proj_u)  # (R,H,v)
        q_latent = jnp.einsum("bthn,Rhn->bthR", q_nope, expand_k)
        scores = jnp.einsum("bthR,bsR->bhts", q_latent, cache.kv, preferred_element_type=acc_dtype)
        if self.config.shared_rope_key:
            k_rope = cache.k_rope[..., 0, :]
            scores += jnp.einsum("bthr,bsr->bhts", q_rope, k_rope, preferred_element_type=acc_dtype)
        else:
            scores += jnp.einsum("bthr,bshr->bhts", q_rope, cache.k_rope, preferred_element_type=acc_dtype)
        weights = masked_softmax(scores * self.config.softmax_scale, mask).astype(self.dtype)
        context = jnp.einsum("bhts,bsR->bthR", weights, cache.kv)
        return self.o_proj(jnp.einsum("Rhd,bthR->bthd", expand_v, context).reshape(*x.shape[:2], -1))

    def _heads(self, x: Float[Array, "B T Hd"]) -> Float[Array, "B T H d"]:
        return x.reshape(*x.shape[:2], self.config.num_attention_heads, -1)

    def _per_head(self, linear: Linear) -> Float[Array, "R H d"]:
        weight = linear.weight[...] if linear.adapter is None else linear.adapter.added_to(linear.weight[...])
        weight = in_dtype(weight, self.dtype)
        return weight.reshape(weight.shape[0], self.config.num_attention_heads, -1)
