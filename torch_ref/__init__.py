"""The PyTorch twin of `jaxllm.model`: plain eager code to compare with, and what an exported folder runs."""

from torch_ref.model import CustomLLM, CustomLLMConfig

__all__ = ["CustomLLM", "CustomLLMConfig"]
