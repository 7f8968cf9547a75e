"""Load balancing of the experts: the update of the routing bias, and two optional losses of the router."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels.token_dispatch import tokens_per_expert
from jaxllm.model.moe import Routing


def updated_routing_bias(bias: Float[Array, "*L E"], counts: Int[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """Auxiliary-loss-free load balancing (arXiv:2408.15664): steer the choice away from overloaded experts.

    Args:
        counts: of each expert's tokens over the whole global batch.
        rate: the size of the update, gamma.
    """
    # In integers: the mean of equal counts, as a product with 1 / E, would be next to them and move every bias.
    mean, rest = jnp.divmod(counts.sum(axis=-1, keepdims=True), counts.shape[-1])
    is_below = (counts < mean) | ((counts == mean) & (rest > 0))
    return bias + rate * (is_below.astype(bias.dtype) - (counts > mean))


def expert_counts(
    routing: Routing, n_experts: int, attention_mask: Shaped[Array, "B T"] | None = None
) -> Int[Array, " E"]:
    """Tokens of each expert, without padding, where the mask is zero."""
    experts = routing.experts
    if attention_mask is not None:
        experts = jnp.where(attention_mask.reshape(-1, 1) > 0, experts, n_experts)
    return tokens_per_expert(experts, n_experts)


def balance_loss(routing: Routing, batch: int, attention_mask: Shaped[Array, "B T"] | None = None) -> Float[Array, ""]:
    """DeepSeek-V3's complementary sequence-wise balance loss (arXiv:2412.19437, eq. 17-20), without its weight.

    1 if every sequence spreads its tokens evenly, larger otherwise; the mean over the batch's sequences, which are the
    rows, or the documents of the mask without padding.
    """
    E = routing.scores.shape[-1]
    k = routing.experts.shape[-1]
    chosen = (routing.experts[..., None] == jnp.arange(E)).sum(axis=1)  # (N,E)
    normalized = routing.scores / (routing.scores.sum(axis=-1, keepdims=True) + 1e-20)
    if attention_mask is None:
        fraction = chosen.reshape(batch, -1, E).mean(axis=1) * (E / k)
        return (fraction * normalized.reshape(batch, -1, E).mean(axis=1)).sum(axis=-1).mean()
    sequence, real = _sequences(attention_mask)

    def summed(of_tokens: Array) -> Array:  # (N,...) -> (N,...): there are at most N sequences
        masked = jnp.where(real.reshape(-1, *[1] * (of_tokens.ndim - 1)), of_tokens, 0)
        return jax.ops.segment_sum(masked, sequence, real.size)

    tokens = summed(real.astype(normalized.dtype))  # of each sequence
    divisor = jnp.maximum(tokens, 1)[:, None]
    losses = (summed(chosen) / divisor * (E / k) * summed(normalized) / divisor).sum(axis=-1)
    return losses.sum() / jnp.maximum((tokens > 0).sum(), 1)


def _sequences(attention_mask: Shaped[Array, "B T"]) -> tuple[Int[Array, " N"], Bool[Array, " N"]]:
    """The sequence of each token, a number below N, and whether it is not padding."""
    documents = attention_mask.astype(jnp.int32)
    rows = jnp.arange(documents.shape[0])[:, None] * documents.shape[1]
    return (rows + jnp.maximum(documents - 1, 0)).reshape(-1), (documents > 0).reshape(-1)


def z_loss(routing: Routing, attention_mask: Shaped[Array, "B T"] | None = None) -> Float[Array, ""]:
    """Router z-loss (ST-MoE, arXiv:2202.08906, eq. 5), without its weight: keeps router logits small."""
    squares = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
    if attention_mask is None:
        return squares.mean()
    real = attention_mask.reshape(-1) > 0
    return jnp.where(real, squares, 0).sum() / jnp.maximum(real.sum(), 1)
