"""Load balancing of the experts: the update of the routing bias, and two optional losses of the router."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxllm.model.dtypes import Array
from jaxllm.model.moe import Routing


def updated_routing_bias(bias: Float[Array, "*L E"], counts: Int[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """Auxiliary-loss-free load balancing (arXiv:2408.15664): steer the choice away from overloaded experts.

    Args:
        counts: of each expert's tokens over the whole global batch.
        rate: the size of the update, gamma.
    """
    counts = counts.astype(bias.dtype)
    return bias + rate * jnp.sign(counts.mean(axis=-1, keepdims=True) - counts)


def balance_loss(routing: Routing, batch: int) -> Float[Array, ""]:
    """DeepSeek-V3's complementary sequence-wise balance loss (arXiv:2412.19437, eq. 17-20), without its weight.

    1 if every sequence spreads its tokens evenly, larger otherwise; the mean over the batch's sequences.
    """
    E = routing.scores.shape[-1]
    k = routing.experts.shape[-1]
    chosen = (routing.experts[..., None] == jnp.arange(E)).sum(axis=1)  # (N,E)
    fraction = chosen.reshape(batch, -1, E).mean(axis=1) * (E / k)
    normalized = routing.scores / (routing.scores.sum(axis=-1, keepdims=True) + 1e-20)
    return (fraction * normalized.reshape(batch, -1, E).mean(axis=1)).sum(axis=-1).mean()


def z_loss(routing: Routing) -> Float[Array, ""]:
    """Router z-loss (ST-MoE, arXiv:2202.08906, eq. 5), without its weight: keeps router logits small."""
    return jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)).mean()
