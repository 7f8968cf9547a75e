"""Small configurations of the DeepSeek family: each option of a config.json that changes the mathematics."""

from typing import Any

Json = dict[str, Any]

V3: Json = {
    "model_type": "deepseek_v3", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64,
    "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3,
    "n_shared_experts": 1, "n_routed_experts": 16, "kv_lora_rank": 20, "q_lora_rank": 28, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "qk_nope_head_dim": 10, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

V2: Json = V3 | {
    "model_type": "deepseek_v2", "n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 16.0,
    "topk_method": "group_limited_greedy",
}  # fmt: skip


def yarn(mscale: float, factor: float = 40.0, theta: float = 10000.0, betas: tuple[float, float] = (32, 1)) -> Json:
    """YaRN in the spelling of DeepSeek's files."""
    scaling = {
        "type": "yarn", "factor": factor, "mscale": mscale, "mscale_all_dim": mscale, "beta_fast": betas[0],
        "beta_slow": betas[1], "original_max_position_embeddings": 64,
    }  # fmt: skip
    return {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": 2560}


def respelled(case: Json) -> Json:
    """The same config.json with its rotary parameters as transformers 5 writes them."""
    case = dict(case)
    scaling, theta = dict(case.pop("rope_scaling", {})), case.pop("rope_theta", 10000.0)
    kind = scaling.pop("type", "default")
    return case | {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


CASES: dict[str, Json] = {
    "v3": V3,
    "v3-queries-not-compressed": V3 | {"q_lora_rank": None},
    "v3-halves": V3 | {"rope_interleave": False},
    "v3-yarn": V3 | yarn(1.0),
    "kimi-yarn": V3 | yarn(1.0, 32.0, 50000.0, (1, 1)) | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1},
    "moonlight": V3 | {
        "n_shared_experts": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
    },
    "v3-gates-not-normalized": V3 | {"norm_topk_prob": False},
    "v3-not-scaled": V3 | {"routed_scaling_factor": 1.0},
    "v3-two-dense-layers": V3 | {"first_k_dense_replace": 2},
    "v3-no-dense-layer": V3 | {"first_k_dense_replace": 0},
    "v3-attention-bias": V3 | {"attention_bias": True},
    "v3-tied": V3 | {"tie_word_embeddings": True},
    "v3-one-expert-per-token": V3 | {"num_experts_per_tok": 1},
    "v2-lite": V2 | yarn(0.707) | {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "topk_method": "greedy",
    },
    "v2": V2 | yarn(1.0),
    "v2-attention-bias": V2 | {"attention_bias": True, "topk_method": "greedy", "routed_scaling_factor": 1.0},
    "glm": V3 | {
        "model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "youtu": {
        **{name: value for name, value in V3.items() if "expert" not in name and "group" not in name},
        "model_type": "youtu", "tie_word_embeddings": True,
    },
}  # fmt: skip
