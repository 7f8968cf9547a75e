"""config.json of the model families that can be read and written, each with its own defaults and refusals.

A family's reader takes a config.json to a ModelConfig; its writer does the reverse and changes no more of the file that
the weights came with than it must. The keys are those of transformers' config classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.config.model import CUSTOMLLM_FIELDS, SPECIAL_TOKENS, ModelConfig, RouterConfig, YarnConfig, deepseek
from jaxllm.errors import UserError, listed, note, shown

Json = Mapping[str, Any]
Names = Literal["customllm", "deepseek"]

FP8_BLOCK = 128
"""Rows and columns of a block of an FP8 file that have one scale."""


@dataclass(frozen=True)
class Family:
    """The models of one model_type."""

    model_type: str
    """As it is written."""
    architecture: str
    """Its class in transformers, or the class of the exported code."""
    names: Names
    """The table of tensor names in `convert.mapping`."""
    read: Callable[[Json], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    """Raises a UserError if the family does not have an option of this config."""


def read_config(values: Json) -> ModelConfig:
    """The model's shape from a config.json; without a model_type, it is one of this project's own runs.

    Raises:
        UserError: the family is not known, or a value is not valid or contradicts the family.
    """
    model_type = values.get("model_type")
    if model_type is None:
        return ModelConfig.from_dict(values)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type is {shown(model_type)}: it must be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type].read(values)


def family_of(config: ModelConfig, source: Json | None = None) -> Family:
    """The family of a model: that of the config.json which its weights came with, or the first that has its options.

    Raises:
        UserError: no family has them.
    """
    known = [FAMILIES[source["model_type"]]] if source and source.get("model_type") in FAMILIES else []
    for family in (*known, *FAMILIES.values()):
        if _holds(family, config):
            return family
    raise UserError(
        "no PyTorch model has all options of this one: it must be a CustomLLM (all other options have their defaults), "
        "or a model of the DeepSeek family (like the preset tiny-deepseek, in other sizes and with another router)"
    )


def _holds(family: Family, config: ModelConfig) -> bool:
    if family.names == "customllm":
        return config.to_dict().keys() <= {*CUSTOMLLM_FIELDS}
    without: dict[str, Any] = {
        "dropout": 0.0,
        "intermediate_size": config.intermediate_size if config.dense_layers else None,
    }
    if not config.moe_layers:
        without |= _NO_EXPERTS
    try:
        back = family.read(family.write(config))
        one, other = (dataclasses.replace(c.resolved(), **without) for c in (config, back))
    except UserError:
        return False
    return one == other


def names_of(config: ModelConfig) -> Names:
    """Which table of tensor names a model has in files."""
    return family_of(config).names


def is_interleaved(source: Json | None) -> bool:
    """Whether files with this config.json rotate the pairs (2i, 2i+1) of a rotary head, as new files do."""
    return (source or {}).get("model_type") == "deepseek_v2" or (source or {}).get("rope_interleave", True) is not False


def write_config(config: ModelConfig, dtype: str, source: Json | None = None, mtp: bool = False) -> dict[str, Any]:
    """The config.json of an exported folder.

    Args:
        dtype: of the weights.
        source: the config.json that the weights came with. What need not change is kept.
        mtp: whether the folder has the source's layers of multi-token prediction.

    Raises:
        UserError: no family has all options of the config.
    """
    family = family_of(config, source)
    head = {"architectures": [family.architecture], "model_type": family.model_type}
    written = family.write(config)
    if source is None:
        more = {} if family.names == "customllm" else _READ_BARE | {"torch_dtype": dtype}
        return head | {"dtype": dtype} | written | more
    if "rope_interleave" in written:
        written["rope_interleave"] = is_interleaved(source)
    before = _written_before(source, family)
    changed = {key: value for key, value in written.items() if key not in before or before[key] != value}
    stale = {"quantization_config", "auto_map"} | (set() if before else {"mlp_layer_types"})
    stale |= {"rope_parameters"} if changed.keys() & {"rope_theta", "rope_scaling"} else set()
    kept = {key: value for key, value in source.items() if key not in stale}
    for key in ("topk_method", "scoring_func"):  # servers route wrongly where they are not named
        if key in written and kept.get(key) is None:
            kept[key] = written[key]
    if kept.get("num_nextn_predict_layers") and not mtp:
        kept["num_nextn_predict_layers"] = 0
    if source.get("dtype", source.get("torch_dtype", dtype)) != dtype:
        head |= {key: dtype for key in ("dtype", "torch_dtype") if key in source}
    return kept | changed | head


def _written_before(source: Json, family: Family) -> dict[str, Any]:
    """What is written for the model of a config.json as it is; nothing if it is of another family or not valid."""
    try:
        before = family.write(read_config(source))
    except UserError:
        return {}
    if FAMILIES.get(source.get("model_type", "")) is not family:
        return {}
    return before | ({"rope_interleave": is_interleaved(source)} if "rope_interleave" in before else {})


def check_trainable(source: Json) -> None:
    """Refuse to train what this project does not train as the file says.

    Raises:
        UserError: the config.json asks for dropout of attention weights.
    """
    if source.get("attention_dropout"):
        raise UserError(f"attention_dropout is {shown(source['attention_dropout'])}: to train, it must be 0")


# CustomLLM


def _read_customllm(values: Json) -> ModelConfig:
    if values.get("tie_word_embeddings"):
        raise UserError("tie_word_embeddings is True: it must be False, CustomLLM's lm_head has a separate matrix")
    known = {name: values[name] for name in CUSTOMLLM_FIELDS if name in values}
    known |= {key: _within_vocabulary(key, values) for key in SPECIAL_TOKENS if key in known}
    return ModelConfig.from_dict(known)


def _write_customllm(config: ModelConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {name: values[name] for name in CUSTOMLLM_FIELDS}


# The DeepSeek family

_READ_BARE: dict[str, Any] = {
    "moe_layer_freq": 1, "seq_aux": True, "aux_loss_alpha": 0.0, "ep_size": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
"""Keys that servers read without a default. `aux_loss_alpha` weighs a loss that DeepSeek's own training code adds."""

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


def _read_deepseek(defaults: Json, file: Json) -> ModelConfig:
    """A model of the DeepSeek family, given its defaults and config.json."""
    values = {**defaults, **file}
    for key in ("topk_method", "scoring_func"):  # null: not said
        values[key] = defaults[key] if values[key] is None else values[key]
    _refuse(values, defaults)
    for key in SPECIAL_TOKENS:
        values[key] = _within_vocabulary(key, values, said=key in file)  # a default is of the family's own vocabulary
    L = values["num_hidden_layers"]
    dense = _dense_layers(values)
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


def _within_vocabulary(key: str, values: Json, said: bool = True) -> Any:
    """A special token's id, or ids, without those that the vocabulary does not have: transformers writes the defaults
    of its classes into small models, and other tools -1 for no token. A line says so where the file has them. A pad
    token beyond the vocabulary is kept, to be refused as transformers refuses it."""
    given, size = values.get(key), values.get("vocab_size")
    if not isinstance(size, int):
        return given
    ids = given if isinstance(given, list) else [given]
    beyond = [
        token for token in ids if isinstance(token, int) and (token < 0 or (token >= size and key != "pad_token_id"))
    ]
    if not beyond:
        return given
    if said:
        note(f"{key} is {shown(given)}: left out {listed(map(str, beyond))}, as ids are 0 to {size - 1}")
    inside = [token for token in ids if token not in beyond]
    return (inside or None) if isinstance(given, list) else None


def _refuse(values: Json, defaults: Json) -> None:
    """Refuse values that contradict the family, or mean another computation."""
    softmax = defaults["scoring_func"] == "softmax"
    heads = values["num_attention_heads"]
    wanted: dict[str, tuple[Any, ...]] = {
        "moe_layer_freq": (1,), "hidden_act": ("silu",), "mlp_bias": (False,), "partial_rotary_factor": (1,),
        "num_key_value_heads": (heads,),
        "scoring_func": (defaults["scoring_func"],),
        "topk_method": ("greedy", "group_limited_greedy") if softmax else ("noaux_tc",),
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


def _dense_layers(values: Json) -> int:
    """How many layers have a dense feed-forward network; the others, with experts, come after them."""
    L, types = values["num_hidden_layers"], values.get("mlp_layer_types")
    if values["model_type"] == "youtu":
        return L
    if values["model_type"] != "glm4_moe_lite":
        first = values["first_k_dense_replace"]
        return min(first, L) if isinstance(first, int) and isinstance(L, int) else first
    if types is None:
        return 1
    if not isinstance(types, list) or len(types) != L or not {*types} <= {"dense", "sparse"}:
        raise UserError(
            f"mlp_layer_types is {shown(types)}: it must be a list of dense or sparse for each of {L} layers"
        )
    dense = types.count("dense")
    if "dense" in types[dense:]:
        raise UserError(f"mlp_layer_types is {shown(types)}: no dense layer may come after a sparse one")
    return dense


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


def _write_deepseek(model_type: str, config: ModelConfig) -> dict[str, Any]:
    values = config.resolved().to_dict()
    router = config.router
    if router.has_bias == (model_type == "deepseek_v2") and config.moe_layers:
        raise UserError(f"topk_method is {router.topk_method!r}: {model_type} does not have it")
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
    if model_type != "deepseek_v2":
        written["rope_interleave"] = True
    if config.moe_layers or model_type != "youtu":
        written |= {name: values[name] for name in _EXPERT_SIZES} | dataclasses.asdict(router)
        written["first_k_dense_replace"] = config.dense_layers
    if model_type == "glm4_moe_lite":
        written["mlp_layer_types"] = ["dense"] * config.dense_layers + ["sparse"] * config.moe_layers
    return written | {"model_type": model_type}


def _deepseek_family(model_type: str, architecture: str, defaults: Json) -> Family:
    def read(file: Json) -> ModelConfig:
        return _read_deepseek(defaults, file)

    def write(config: ModelConfig) -> dict[str, Any]:
        return _write_deepseek(model_type, config)

    return Family(model_type, architecture, "deepseek", read, write)


_V3 = _deepseek_family("deepseek_v3", "DeepseekV3ForCausalLM", _V3_DEFAULTS)

FAMILIES: dict[str, Family] = {
    "customllm": Family("customllm", "CustomLLM", "customllm", _read_customllm, _write_customllm),
    "deepseek_v3": _V3,
    "deepseek_v2": _deepseek_family("deepseek_v2", "DeepseekV2ForCausalLM", _V2_DEFAULTS),
    "kimi_k2": _V3,  # stock transformers does not know this model_type, and reads the same model as deepseek_v3
    "glm4_moe_lite": _deepseek_family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _GLM_DEFAULTS),
    "youtu": _deepseek_family("youtu", "YoutuForCausalLM", _YOUTU_DEFAULTS),
}
