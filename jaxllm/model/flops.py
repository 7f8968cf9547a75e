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
    return {
        "token_embeddings": V * D,
        "position_embeddings": config.max_position_embeddings * D,
        "attention": L * _attention_weights(config),
        "router": L * D * E,
        "shared_experts": L * config.n_shared_experts * _expert_weights(config),
        "routed_experts": L * E * _expert_weights(config),
        "norms": (2 * L + config.final_norm) * D,
        "lm_head": D * V + V,
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
        "attention_scores": 2 * L * D * keys,  # H heads of h = D/H
        "attention_values": 2 * L * D * keys,
        "router": 2 * L * D * config.n_routed_experts,
        "shared_experts": 2 * L * config.n_shared_experts * _expert_weights(config),
        "routed_experts": 2 * L * config.num_experts_per_tok * _expert_weights(config),
        "lm_head": 2 * D * V,
    }


def training_flops_per_token(config: ModelConfig, length: int, attention: Attention) -> float:
    """FLOPs of one token's forward and backward pass; the optimizer's few per parameter are left out."""
    return TRAINING_FACTOR * sum(forward_flops(config, length, attention).values())


def _attention_weights(config: ModelConfig) -> int:
    D, R, H = config.hidden_size, config.latent_size, config.num_attention_heads
    nope, rope = H * config.nope_head_dim, H * config.rope_head_dim
    down = 2 * D * R  # kv_proj_d, q_proj_d
    up = 2 * R * nope + R * D  # k_proj_u, q_proj_u, v_proj_u
    return down + up + D * rope + R * rope + D * D  # rope_k, rope_q, o_proj


def _expert_weights(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size  # gate_proj, up_proj, down_proj
