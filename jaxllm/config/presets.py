"""The presets: the shapes of models by name."""

import dataclasses

from jaxllm.config.model import ModelConfig, RouterConfig, YarnConfig, deepseek
from jaxllm.errors import UserError, shown

_V2_LITE = deepseek(
    vocab_size=102400, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=0, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, intermediate_size=10944,
    moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    router=RouterConfig("softmax", "greedy", norm_topk_prob=False), max_position_embeddings=163840, rms_norm_eps=1e-6,
    rope_scaling=YarnConfig(40.0, mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip
_V3 = dataclasses.replace(
    _V2_LITE, vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536,
    first_k_dense_replace=3, intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256,
    n_shared_experts=1, num_experts_per_tok=8, router=RouterConfig(n_group=8, topk_group=4, routed_scaling_factor=2.5),
    rope_scaling=YarnConfig(40.0, mscale=1.0, mscale_all_dim=1.0),
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    # the default of train.py: trains in minutes on two cores; its vocabulary is the tokenizer's
    "tiny": ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        moe_intermediate_size=256,
        max_position_embeddings=512,
        dropout=0.0,
        final_norm=True,
    ),
    # the source's breakdown
    "customllm-768": ModelConfig(
        vocab_size=49152, hidden_size=768, num_hidden_layers=24, num_attention_heads=12, moe_intermediate_size=1536
    ),
    # the source's printed tree: 1,075,060,736 parameters
    "customllm-1b": ModelConfig(
        vocab_size=49152, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, moe_intermediate_size=1536
    ),
    # all that DeepSeek-V3 has, in a size that trains in minutes; its vocabulary is the tokenizer's
    "tiny-deepseek": deepseek(
        vocab_size=4096, hidden_size=192, num_hidden_layers=3, num_attention_heads=4, q_lora_rank=96, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1, intermediate_size=512,
        moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, max_position_embeddings=512,
        router=RouterConfig(n_group=4, topk_group=2, routed_scaling_factor=1.5), rms_norm_eps=1e-6,
    ),
    # the public models: arXiv:2405.04434, arXiv:2412.19437, arXiv:2502.16982, arXiv:2507.20534
    "deepseek-v2-lite": _V2_LITE,
    "deepseek-v2": dataclasses.replace(
        _V2_LITE, hidden_size=5120, num_hidden_layers=60, num_attention_heads=128, q_lora_rank=1536,
        intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160,
        router=RouterConfig("softmax", "group_limited_greedy", 8, 3, False, 16.0),
    ),
    "deepseek-v3": _V3,
    "moonlight-16b": dataclasses.replace(
        _V2_LITE, vocab_size=163840, intermediate_size=11264, router=RouterConfig(routed_scaling_factor=2.446),
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=50000.0, rope_scaling=YarnConfig(),
    ),
    "kimi-k2": dataclasses.replace(
        _V3, vocab_size=163840, num_attention_heads=64, first_k_dense_replace=1, n_routed_experts=384,
        router=RouterConfig(routed_scaling_factor=2.827), max_position_embeddings=131072, rope_theta=50000.0,
        rope_scaling=YarnConfig(32.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    "glm-4.7-flash": dataclasses.replace(
        _V3, vocab_size=154880, hidden_size=2048, num_hidden_layers=47, num_attention_heads=20, q_lora_rank=768,
        qk_nope_head_dim=192, v_head_dim=256, first_k_dense_replace=1, intermediate_size=10240,
        moe_intermediate_size=1536, n_routed_experts=64, num_experts_per_tok=4,
        router=RouterConfig(routed_scaling_factor=1.8), max_position_embeddings=202752, rms_norm_eps=1e-5,
        rope_theta=1000000.0, rope_scaling=YarnConfig(),
    ),
}  # fmt: skip

TOKENIZER_SIZED_PRESETS = frozenset({"tiny", "tiny-deepseek"})
"""Presets without a vocabulary of their own: train.py gives them the tokenizer's size."""


def preset(name: str) -> ModelConfig:
    """Look up a preset by name. Raises a UserError if there is no such preset."""
    if name not in PRESETS:
        raise UserError(f"preset is {shown(name)}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
