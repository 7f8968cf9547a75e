"""What a model costs, by arithmetic on its config alone: parameters, and floating-point operations of a token.

Operations are those of matrix products, 2*m*n*k for (m,k) @ (k,n); look-ups, norms, softmax, activations and the sort
of the routed rows are left out, as is usual. They are *model* FLOPs: what the mathematics needs, whatever a program
pads or computes again. Attention is counted by either of two conventions, and a quoted number must name its convention:

    full      every query attends to all T keys, T x T (the convention of PaLM, arXiv:2204.02311, appendix B)
    causal    half of that, as a query sees on average half of the keys

Letters as in `jaxllm.model`. Imports neither JAX nor PyTorch.
"""

from typing import Literal

from jaxllm.config import ModelConfig

Attention = Literal["full", "causal"]

TRAINING_FACTOR = 3
"""The backward pass makes two products of each: one for the input's gradient, one for the weight's.

Layers that are recomputed (`remat`) do not count: that is the program's work and not the model's.
"""


def parameters(config: ModelConfig) -> dict[str, int]:
    """Trained parameters by part, over all layers; their sum is the model's. The routing bias is state: not among them.

    The tables of token and position embeddings count whole.
    """
    D, V, L, E = config.hidden_size, config.vocab_size, config.num_hidden_layers, config.n_routed_experts
    R, Q, rotary = config.kv_latent_size, config.q_latent_size, config.rope_key_heads * config.rope_head_dim
    biases = (R + Q + rotary + D) * config.attention_bias
    return {
        "token_embeddings": V * D,
        "position_embeddings": config.max_position_embeddings * D * config.learned_positions,
        "attention": L * (_attention_weights(config) + (R + Q) * config.latent_norm + biases),
        "dense_layers": config.dense_layers * _dense_weights(config),
        "router": config.moe_layers * D * E,
        "shared_experts": config.moe_layers * config.n_shared_experts * _expert_weights(config),
        "routed_experts": config.moe_layers * E * _expert_weights(config),
        "norms": (2 * L + config.final_norm) * D,
        "lm_head": (not config.tie_word_embeddings) * (D * V + V * config.lm_head_bias),
    }


def active_parameters(config: ModelConfig) -> dict[str, int]:
    """The parameters that one token uses: of the E routed experts k, of everything else all.

    The embedding tables count whole here too, although a token reads one row of each.
    """
    parts = parameters(config)
    return parts | {"routed_experts": parts["routed_experts"] // config.n_routed_experts * config.num_experts_per_tok}


def forward_flops(config: ModelConfig, length: int, attention: Attention) -> dict[str, float]:
    """FLOPs of one token's forward pass by part, over all layers, in a sequence of `length` tokens (T).

    The parts of a loss over all positions: each token's logits are among them.
    """
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    keys = {"full": length, "causal": length / 2}[attention]
    return {
        "attention_projections": 2 * L * _attention_weights(config),
        "attention_scores": 2 * L * config.num_attention_heads * config.qk_head_dim * keys,
        "attention_values": 2 * L * config.num_attention_heads * config.value_head_dim * keys,
        "dense_layers": 2 * config.dense_layers * _dense_weights(config),
        "router": 2 * config.moe_layers * D * config.n_routed_experts,
        "shared_experts": 2 * config.moe_layers * config.n_shared_experts * _expert_weights(config),
        "routed_experts": 2 * config.moe_layers * config.num_experts_per_tok * _expert_weights(config),
        "lm_head": 2 * D * V,
    }


def training_flops_per_token(config: ModelConfig, length: int, attention: Attention, *, frozen: bool = False) -> float:
    """FLOPs of one token's forward and backward pass; the optimizer's few per parameter are left out.

    With `frozen` weights, of which adapters alone are trained, their gradients are left out, and the adapters' few.
    """
    parts = forward_flops(config, length, attention)
    scores = parts["attention_scores"] + parts["attention_values"]  # no weights: two gradients in any case
    return TRAINING_FACTOR * sum(parts.values()) - frozen * (sum(parts.values()) - scores)


def _attention_weights(config: ModelConfig) -> int:
    D, R, Q, H = config.hidden_size, config.kv_latent_size, config.q_latent_size, config.num_attention_heads
    values = H * config.value_head_dim
    keys = D * (R + config.rope_key_heads * config.rope_head_dim)  # kv_proj_d, rope_k
    queries = D * Q + (Q or D) * H * config.qk_head_dim  # q_proj_d; q_proj_u and rope_q
    return keys + queries + R * (H * config.nope_head_dim + values) + values * D  # k_proj_u, v_proj_u; o_proj


def _dense_weights(config: ModelConfig) -> int:
    return 3 * config.hidden_size * (config.intermediate_size or 0)


def _expert_weights(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size  # gate_proj, up_proj, down_proj
