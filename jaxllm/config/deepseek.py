"""config.json of the DeepSeek family. The keys are those of transformers' config classes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxllm.config.family import Family, Json, Names, within_vocabulary
from jaxllm.config.model import SPECIAL_TOKENS, ModelConfig, RouterConfig, YarnConfig, deepseek
from jaxllm.errors import UserError, shown

FP8_BLOCK = 128
"""Rows and columns of a block of an FP8 file that have one scale."""

_NO_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 1, "n_routed_experts": 1, "n_shared_experts": 1, "num_experts_per_tok": 1,
    "router": RouterConfig(),
}  # fmt: skip

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "rms_norm_eps",
    "initializer_range", "attention_bias", "tie_word_embeddings", "bos_token_id", "pad_token_id",
)  # fmt: skip
_EXPERT_SIZES = ("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")

# The defaults of transformers' config classes, for keys that a file lacks.
_V3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "norm_topk_prob": True, "max_position_embeddings": 4096, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "attention_bias": False,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
_V2_DEFAULTS = _V3_DEFAULTS | {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 32, "num_attention_heads": 32, "n_shared_experts": 2, "n_routed_experts": 64,
    "routed_scaling_factor": 1.0, "n_group": None, "topk_group": None, "num_experts_per_tok": None,
    "first_k_dense_replace": 0, "norm_topk_prob": False, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "scoring_func": "softmax", "topk_method": "greedy",
}  # fmt: skip
_GLM_DEFAULTS = _V3_DEFAULTS | {
    "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
    "num_hidden_layers": 47, "num_attention_heads": 20, "n_routed_experts": 64, "routed_scaling_factor": 1.8,
    "q_lora_rank": 768, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 4, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5,
}  # fmt: skip
_YOUTU_DEFAULTS = _V3_DEFAULTS | {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
    "num_attention_heads": 16, "max_position_embeddings": 131072, "initializer_range": 0.01976423537605237,
    "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class DeepSeek(Family):
    defaults: Json
    """Values of keys that a file lacks."""
    router_methods: tuple[str, ...] = ("noaux_tc",)
    """The choices of `topk_method`."""
    dense_layers: Literal["first_k_dense_replace", "mlp_layer_types", "all"] = "first_k_dense_replace"
    """The key that says which layers are dense, or that all are."""
    has_rope_interleave: bool = True
    """Whether files have the key `rope_interleave`; those of other models are interleaved."""

    names: ClassVar[Names] = "deepseek"
    bare: ClassVar[Json] = {
        "moe_layer_freq": 1, "seq_aux": True, "aux_loss_alpha": 0.0, "ep_size": 1, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    # which servers read without a default; `aux_loss_alpha` weighs a loss that DeepSeek's own training code adds

    def read(self, values: Json) -> ModelConfig:
        file, defaults = values, self.defaults
        values = {**defaults, **file}
        for key in ("topk_method", "scoring_func"):  # null is the default
            values[key] = defaults[key] if values[key] is None else values[key]
        _refuse(values, defaults["scoring_func"], self.router_methods)
        for key in SPECIAL_TOKENS:
            values[key] = within_vocabulary(key, values, said=key in file)  # a default is of another vocabulary
        L = values["num_hidden_layers"]
        dense = self._count_dense_layers(values)
        shape: dict[str, Any] = {name: values.get(name) for name in _SIZES}
        shape |= {name: values[name] for name in _EXPERT_SIZES} if dense != L else _NO_EXPERTS
        for name in (*_SIZES[:8], *_EXPERT_SIZES):
            if shape[name] is None:
                raise UserError(f"{name} is {values.get(name)}: it must be a number")
        eos = values.get("eos_token_id")
        return deepseek(
            **shape | {"router": _router(values) if dense != L else RouterConfig()},
            q_lora_rank=values["q_lora_rank"] or 0,
            first_k_dense_replace=dense,
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            **_rope(values),
        )

    def _count_dense_layers(self, values: Json) -> int:
        """How many layers have a dense feed-forward network; the others, with experts, come after them."""
        L = values["num_hidden_layers"]
        if self.dense_layers == "all":
            return L
        if self.dense_layers == "first_k_dense_replace":
            first = values["first_k_dense_replace"]
            return min(first, L) if isinstance(first, int) and isinstance(L, int) else first
        types = values.get("mlp_layer_types")
        if types is None:
            return 1
        if not isinstance(types, list) or len(types) != L or any(kind not in ("dense", "sparse") for kind in types):
            raise UserError(
                f"mlp_layer_types is {shown(types)}: it must be a list of dense or sparse for each of {L} layers"
            )
        dense = types.count("dense")
        if "dense" in types[dense:]:
            raise UserError(f"mlp_layer_types is {shown(types)}: no dense layer may come after a sparse one")
        return dense

    def write(self, config: ModelConfig) -> dict[str, Any]:
        values = config.resolved().to_dict()
        router = config.router
        if config.moe_layers and router.topk_method not in self.router_methods:
            raise UserError(f"topk_method is {router.topk_method!r}: {self.model_type} does not have it")
        written = {name: values.get(name) for name in _SIZES} | {
            "attention_bias": config.attention_bias,
            "tie_word_embeddings": config.tie_word_embeddings,
            "intermediate_size": config.intermediate_size or config.moe_intermediate_size,
            "num_key_value_heads": config.num_attention_heads,
            "q_lora_rank": config.q_latent_size or None,
            "eos_token_id": values["eos_token_id"],
            "hidden_act": "silu",
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
        }
        if config.rope_scaling != YarnConfig():
            yarn = {name: value for name, value in dataclasses.asdict(config.rope_scaling).items() if value is not None}
            written["rope_scaling"] = {"type": "yarn", **yarn}
        if self.has_rope_interleave:
            written["rope_interleave"] = True
        if config.moe_layers or self.dense_layers != "all":
            written |= {name: values[name] for name in _EXPERT_SIZES} | dataclasses.asdict(router)
            written["first_k_dense_replace"] = config.dense_layers
        if self.dense_layers == "mlp_layer_types":
            written["mlp_layer_types"] = ["dense"] * config.dense_layers + ["sparse"] * config.moe_layers
        return written | {"model_type": self.model_type}

    def holds(self, config: ModelConfig) -> bool:
        without: dict[str, Any] = {
            "dropout": 0.0,
            "intermediate_size": config.intermediate_size if config.dense_layers else None,
        }
        if not config.moe_layers:
            without |= _NO_EXPERTS
        try:
            back = self.read(self.write(config))
            one, other = (dataclasses.replace(c.resolved(), **without) for c in (config, back))
        except UserError:
            return False
        return one == other

    def is_interleaved(self, values: Json) -> bool:
        return not self.has_rope_interleave or values.get("rope_interleave", True) is not False


def _refuse(values: Json, scoring_func: str, router_methods: tuple[str, ...]) -> None:
    """Refuse values that contradict the family, or mean another computation."""
    heads = values["num_attention_heads"]
    wanted: dict[str, tuple[Any, ...]] = {
        "moe_layer_freq": (1,), "hidden_act": ("silu",), "mlp_bias": (False,), "partial_rotary_factor": (1,),
        "num_key_value_heads": (heads,),
        "scoring_func": (scoring_func,),
        "topk_method": router_methods,
    }  # fmt: skip
    for key, choices in wanted.items():
        value = values.get(key)
        if value is not None and value not in choices:
            must = " or ".join(str(choice) for choice in choices)
            raise UserError(f"{key} is {shown(value)}: with model_type {values['model_type']} it must be {must}")
    if (quantization := values.get("quantization_config")) is not None:
        known = isinstance(quantization, Mapping)
        method = quantization.get("quant_method") if known else quantization
        block = quantization.get("weight_block_size") if known else None
        if method != "fp8" or block != [FP8_BLOCK, FP8_BLOCK]:
            raise UserError(
                f"quantization_config has quant_method {shown(method)} and weight_block_size {shown(block)}: only fp8 "
                f"in blocks of [{FP8_BLOCK}, {FP8_BLOCK}] is read"
            )


def _router(values: Json) -> RouterConfig:
    method = values["topk_method"]
    groups = {name: values[name] or 1 for name in ("n_group", "topk_group")}
    if method == "greedy" or groups["n_group"] == 1:
        groups = {"n_group": 1, "topk_group": 1}
    return RouterConfig(
        scoring_func=values["scoring_func"],
        topk_method=method,
        norm_topk_prob=method == "noaux_tc" and values["norm_topk_prob"],  # V2 never normalizes
        routed_scaling_factor=values["routed_scaling_factor"],
        **groups,
    )


def _rope(values: Json) -> dict[str, Any]:
    """The rotary parameters, in either spelling; `rope_scaling` wins."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    for name, given in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(given, Mapping):
            raise UserError(f"{name} is {shown(given)}: it must be an object")
    given = old or new
    kind = given.get("rope_type", given.get("type", "default"))
    theta = next((place["rope_theta"] for place in (given, values) if place.get("rope_theta") is not None), 10000.0)
    if kind not in ("default", "yarn"):
        raise UserError(f"rope_type is {shown(kind)}: it must be default or yarn")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": YarnConfig()}
    fields = {f.name: given[f.name] for f in dataclasses.fields(YarnConfig) if given.get(f.name) is not None}
    length = values["max_position_embeddings"]
    original = fields.setdefault("original_max_position_embeddings", length)
    if "factor" not in fields and isinstance(length, int) and isinstance(original, int) and original > 0:
        fields["factor"] = length / original
    return {"rope_theta": theta, "rope_scaling": YarnConfig(**fields)}


DEEPSEEK_FAMILIES = (
    DeepSeek("deepseek_v3", "DeepseekV3ForCausalLM", _V3_DEFAULTS),
    DeepSeek(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _V2_DEFAULTS,
        router_methods=("greedy", "group_limited_greedy"),
        has_rope_interleave=False,
    ),
    DeepSeek("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _GLM_DEFAULTS, dense_layers="mlp_layer_types"),
    DeepSeek("youtu", "YoutuForCausalLM", _YOUTU_DEFAULTS, dense_layers="all"),
)
