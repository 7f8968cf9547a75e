"""Train a Multi-head-Latent-Attention + DeepSeekMoE decoder in JAX, with a PyTorch reference that matches it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.to_flax import from_pretrained
    from convert.to_torch import save_pretrained
    from jaxllm.config import PRESETS, ModelConfig, TrainConfig
    from jaxllm.errors import UserError
    from jaxllm.generate import load_model
    from jaxllm.model.decoder import CustomLLM
    from jaxllm.model.inference import for_inference

__all__ = [
    "PRESETS", "CustomLLM", "ModelConfig", "TrainConfig", "UserError", "for_inference", "from_pretrained",
    "load_model", "save_pretrained",
]  # fmt: skip

_PLACES = {
    "jaxllm.config": ("PRESETS", "ModelConfig", "TrainConfig"),
    "jaxllm.errors": ("UserError",),
    "jaxllm.generate": ("load_model",),
    "jaxllm.model.decoder": ("CustomLLM",),
    "jaxllm.model.inference": ("for_inference",),
    "convert.to_flax": ("from_pretrained",),
    "convert.to_torch": ("save_pretrained",),
}


def __getattr__(name: str) -> Any:
    # On demand: configurations and error messages need no JAX, whose import takes a second.
    for module, names in _PLACES.items():
        if name in names:
            if module.startswith("convert."):
                importlib.import_module("jaxllm.packages").check_own("convert")
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
