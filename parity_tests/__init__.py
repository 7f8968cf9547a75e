"""Compares models in JAX and PyTorch, from their weights to their training: our own two, and any pair.

The names of a pair are imported on demand, so that a side can run where the other framework is not installed.
"""

import importlib
from typing import Any

_HOMES = {
    "TorchSide": "torch_side", "FunctionSide": "jax_side", "nnx_side": "jax_adapters", "linen_side": "jax_adapters",
    "eqx_side": "jax_adapters", "RecordedSide": "side", "tap": "tap", "pair": "pair", "record": "pair",
    "Options": "pair", "Verdict": "pair", "Record": "record", "write_verdict": "page",
}  # fmt: skip

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"parity_tests.engine.{_HOMES[name]}"), name)
