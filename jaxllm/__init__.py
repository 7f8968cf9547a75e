"""Train a Multi-head-Latent-Attention + DeepSeekMoE decoder in JAX, with a PyTorch reference that matches it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.to_flax import import_model as from_pretrained
    from convert.to_torch import export_model as save_pretrained
    from jaxllm.config import PRESETS, ModelConfig, TrainConfig
    from jaxllm.errors import UserError
    from jaxllm.generate import load_model
    from jaxllm.model.decoder import CustomLLM

__all__ = [
    "PRESETS", "CustomLLM", "ModelConfig", "TrainConfig", "UserError", "from_pretrained", "load_model",
    "save_pretrained",
]  # fmt: skip

_PLACES = {
    "PRESETS": ("jaxllm.config", "PRESETS"),
    "CustomLLM": ("jaxllm.model.decoder", "CustomLLM"),
    "ModelConfig": ("jaxllm.config", "ModelConfig"),
    "TrainConfig": ("jaxllm.config", "TrainConfig"),
    "UserError": ("jaxllm.errors", "UserError"),
    "from_pretrained": ("convert.to_flax", "import_model"),
    "load_model": ("jaxllm.generate", "load_model"),
    "save_pretrained": ("convert.to_torch", "export_model"),
}


def __getattr__(name: str) -> Any:
    # On demand: configurations and error messages need no JAX, whose import takes a second.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
