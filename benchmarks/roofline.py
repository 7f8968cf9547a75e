"""The operations that a training step must do, and how fast this machine multiplies matrices."""

from __future__ import annotations

from jaxllm.config import ModelConfig


def product_parameters(config: ModelConfig) -> int:
    """Parameters that multiply a token on its way: those of its k experts, not of all; no embeddings, no norms."""
    D, R, F = config.hidden_size, config.latent_size, config.moe_intermediate_size
    rope = config.num_attention_heads * config.rope_head_dim
    nope = config.num_attention_heads * config.nope_head_dim
    attention = 2 * D * R + 2 * R * nope + R * D + D * rope + R * rope + D * D
    experts = 3 * D * F * (config.num_experts_per_tok + config.n_shared_experts)
    return config.num_hidden_layers * (attention + experts + D * config.n_routed_experts) + D * config.vocab_size


def train_flops(config: ModelConfig, seq_len: int, tokens: int) -> int:
    """Floating-point operations of a step's forward and backward pass, without recomputation, norms and optimizer.

    A token attends to the tokens before it and to itself, (T+1)/2 in the mean: the masked half does not count.
    """
    attention = 2 * config.num_hidden_layers * config.hidden_size * (seq_len + 1)  # 2 products of 2 operations
    return 3 * tokens * (2 * product_parameters(config) + attention)
