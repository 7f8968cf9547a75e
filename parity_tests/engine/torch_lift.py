"""Lift a PyTorch program to float64: what asks for float32 by name gets float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map  # the only pytree of PyTorch

LOW = (torch.bfloat16, torch.float16)


class Lifted(TorchFunctionMode):
    """Within it float32 is float64: casts, `dtype=`, and tensors that the model or its inputs bring.

    Attributes:
        findings: casts below float32, each with its module.
    """

    def __init__(self, low: bool = False):
        """
        Args:
            low: the model is meant to be in a dtype below float32, which is lifted too.
        """
        super().__init__()
        self.low = low
        self.findings: list[str] = []
        self.module = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if func is torch.Tensor.float or (self.low and func in (torch.Tensor.half, torch.Tensor.bfloat16)):
            return args[0].double()
        if not self.low:
            self._note(func, name, args, kwargs or {})
        in_place = name.endswith("_") or name == "__setitem__"

        def widen(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return torch.float64 if self._narrow(value) else value
            if isinstance(value, torch.Tensor) and self._narrow(value.dtype) and value is not target:
                return torch.Tensor.double(value)
            return value

        target = args[0] if in_place and args else None
        if name in ("__get__", "__set__") or name.startswith("_"):
            return func(*args, **(kwargs or {}))
        return func(*tree_map(widen, tuple(args)), **tree_map(widen, kwargs or {}))

    def _narrow(self, dtype: torch.dtype) -> bool:
        return dtype is torch.float32 or (self.low and dtype in LOW)

    def _note(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        asked = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype) and value in LOW]
        if func in (torch.Tensor.half, torch.Tensor.bfloat16):
            asked.append(torch.float16 if func is torch.Tensor.half else torch.bfloat16)
        if asked:
            finding = f"{self.module or '(root)'}: {name} to {str(asked[0]).removeprefix('torch.')}"
            if finding not in self.findings:
                self.findings.append(finding)


@contextmanager
def default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
