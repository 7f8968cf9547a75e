"""The PyTorch reference of `jaxllm.model`: plain eager code, and what an exported folder runs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_ref.model import CustomLLM, CustomLLMConfig

__all__ = ["CustomLLM", "CustomLLMConfig"]


def __getattr__(name: str) -> Any:
    # On demand: `python -m torch_ref.train --help` needs no PyTorch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch_ref import model

    return getattr(model, name)
