"""config.json of the model families that can be read and written, each with its own defaults and refusals.

A family's reader takes a config.json to a ModelConfig; its writer does the reverse and changes no more of the file that
the weights came with than it must. The keys are those of transformers' config classes.
"""

from typing import Any, ClassVar

from jaxllm.config.deepseek import DEEPSEEK_FAMILIES
from jaxllm.config.family import Family, Json, Names, within_vocabulary
from jaxllm.config.model import CUSTOMLLM_FIELDS, SPECIAL_TOKENS, ModelConfig
from jaxllm.errors import UserError, shown


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
        if family.holds(config):
            return family
    raise UserError(
        "no PyTorch model has all options of this one: it must be a CustomLLM (all other options have their defaults), "
        "or a model of the DeepSeek family (like the preset tiny-deepseek, in other sizes and with another router)"
    )


def names_of(config: ModelConfig) -> Names:
    """Which table of tensor names a model has in files."""
    return family_of(config).names


def is_interleaved(source: Json | None) -> bool:
    """`Family.is_interleaved` of the family that a config.json names; new files are."""
    family = FAMILIES.get((source or {}).get("model_type") or "")
    return family is None or source is None or family.is_interleaved(source)


def write_config(config: ModelConfig, dtype: str, source: Json | None = None, mtp: bool = False) -> dict[str, Any]:
    """The config.json of an exported folder.

    Args:
        dtype: of the weights.
        source: the config.json that the weights came with. What need not change stays as it is.
        mtp: whether the folder has the source's layers of multi-token prediction.

    Raises:
        UserError: no family has all options of the config.
    """
    family = family_of(config, source)
    head = {"architectures": [family.architecture], "model_type": family.model_type}
    written = family.write(config)
    if source is None:
        return head | {"dtype": dtype} | written | {**family.bare} | ({"torch_dtype": dtype} if family.bare else {})
    if "rope_interleave" in written:
        written["rope_interleave"] = is_interleaved(source)
    before = _written_before(source, family)
    changed = {key: value for key, value in written.items() if key not in before or before[key] != value}
    stale = {"quantization_config", "auto_map"} | (set() if before else {"mlp_layer_types"})
    stale |= {"rope_parameters"} if changed.keys() & {"rope_theta", "rope_scaling"} else set()
    result = {key: value for key, value in source.items() if key not in stale}
    for key in ("topk_method", "scoring_func"):  # servers route wrongly where they are not named
        if key in written and result.get(key) is None:
            result[key] = written[key]
    if result.get("num_nextn_predict_layers") and not mtp:
        result["num_nextn_predict_layers"] = 0
    if source.get("dtype", source.get("torch_dtype", dtype)) != dtype:
        head |= {key: dtype for key in ("dtype", "torch_dtype") if key in source}
    return result | changed | head


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
    """Raise a UserError if the config.json asks for dropout of attention weights, which training does not have."""
    if source.get("attention_dropout"):
        raise UserError(f"attention_dropout is {shown(source['attention_dropout'])}: to train, it must be 0")


class _CustomLLM(Family):
    names: ClassVar[Names] = "customllm"

    def read(self, values: Json) -> ModelConfig:
        if values.get("tie_word_embeddings"):
            raise UserError("tie_word_embeddings is True: it must be False, CustomLLM's lm_head has a separate matrix")
        known = {name: values[name] for name in CUSTOMLLM_FIELDS if name in values}
        known |= {key: within_vocabulary(key, values) for key in SPECIAL_TOKENS if key in known}
        return ModelConfig.from_dict(known)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        values = config.to_dict()
        return {name: values[name] for name in CUSTOMLLM_FIELDS}

    def holds(self, config: ModelConfig) -> bool:
        return config.to_dict().keys() <= {*CUSTOMLLM_FIELDS}


FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (_CustomLLM("customllm", "CustomLLM"), *DEEPSEEK_FAMILIES)
}
FAMILIES["kimi_k2"] = FAMILIES["deepseek_v3"]  # the same model, whose model_type stock transformers does not know
