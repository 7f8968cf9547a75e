"""jaxllm: train a Multi-head-Latent-Attention + DeepSeekMoE decoder in JAX, with a PyTorch twin that agrees with it."""

from jaxllm.config import PRESETS, ModelConfig, TrainConfig
from jaxllm.errors import UserError

__all__ = ["PRESETS", "CustomLLM", "ModelConfig", "TrainConfig", "UserError"]


def __getattr__(name: str):
    # On demand: configurations and error messages need no JAX, whose import takes a second.
    if name == "CustomLLM":
        from jaxllm.model.decoder import CustomLLM

        return CustomLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
