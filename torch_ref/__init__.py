"""The PyTorch reference of `jaxllm.model`: plain eager code, and what an exported folder runs."""

from torch_ref.model import CustomLLM, CustomLLMConfig

__all__ = ["CustomLLM", "CustomLLMConfig"]
