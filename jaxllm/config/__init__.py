"""Configuration of models and runs. Imports no JAX."""

from jaxllm.config.fields import MAX_INT, MAX_SEED
from jaxllm.config.groups import AXES
from jaxllm.config.lora import LoraConfig
from jaxllm.config.model import SPECIAL_TOKENS, ModelConfig, RouterConfig, YarnConfig
from jaxllm.config.presets import PRESETS, preset
from jaxllm.config.train import (
    DEFAULT_RECIPE,
    FORMAT,
    KernelsOption,
    Precision,
    PrecisionOption,
    RunConfig,
    TrainConfig,
    changed_options,
    recipe,
)

__all__ = [
    "AXES", "DEFAULT_RECIPE", "FORMAT", "MAX_INT", "MAX_SEED", "PRESETS", "SPECIAL_TOKENS",
    "KernelsOption", "LoraConfig", "ModelConfig", "Precision", "PrecisionOption", "RouterConfig", "RunConfig",
    "TrainConfig", "YarnConfig", "changed_options", "preset", "recipe",
]  # fmt: skip
