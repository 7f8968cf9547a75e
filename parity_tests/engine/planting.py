"""Changes to a PyTorch model that last as long as a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def with_values(changes: list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]) -> Iterator[None]:
    """Tensors with other values, which are restored."""
    before = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
    with torch.no_grad():
        new = [change(tensor.detach().clone()) for tensor, change in changes]
        for (tensor, _), values in zip(changes, new, strict=True):
            tensor.copy_(values)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)


@contextmanager
def with_attributes(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def on_output(change: Callable[[Any, Any], torch.Tensor]) -> Callable[..., Any]:
    """A forward hook that changes a module's output, or the first of several."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0], args), *output[1:])
        return change(output, args) if isinstance(output, torch.Tensor) else output

    return hook
