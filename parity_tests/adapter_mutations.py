"""Planted faults of adapters: each changes a model with adapters after PEFT has loaded it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any
from unittest import mock

import torch

from jaxllm.errors import UserError
from parity_tests.mutations import Mutation

ADAPTER_MUTATIONS: dict[str, Mutation] = {}


def _mutation(what: str) -> Callable[[Callable[[list[Any]], None]], Callable[[list[Any]], None]]:
    """Register a function that changes PEFT's layers, in the order of the model."""

    def register(change: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
        @contextmanager
        def plant(model: Any) -> Iterator[None]:
            kind = importlib.import_module("peft").PeftModel  # a fault is listed without it
            load = kind.from_pretrained

            def changed(*args: Any, **options: Any) -> Any:
                adapted = load(*args, **options)
                with torch.no_grad():
                    change([module for module in adapted.modules() if getattr(module, "lora_A", None)])
                return adapted

            with mock.patch.object(kind, "from_pretrained", changed):
                yield

        ADAPTER_MUTATIONS[change.__name__] = Mutation(plant, "adapters", what)
        return change

    return register


@_mutation("logits")
def adapter_scale_of_rslora(layers: list[Any]) -> None:
    """alpha / sqrt(r) in place of alpha / r, or the reverse."""
    for layer in layers:
        rank, scale = layer.r["default"], layer.scaling["default"]
        plain = layer.lora_alpha["default"] / rank
        layer.scaling["default"] = plain * rank**0.5 if scale == plain else plain


@_mutation("logits")
def adapter_scale_missing(layers: list[Any]) -> None:
    """The product of A and B is not multiplied."""
    for layer in layers:
        layer.scaling["default"] = 1.0


@_mutation("logits")
def adapter_left_out(layers: list[Any]) -> None:
    """One matrix has no adapter."""
    layers[-1].scaling["default"] = 0.0


@_mutation("weights")
def adapters_exchanged(layers: list[Any]) -> None:
    """Two matrices of the same shape have each other's A and B."""

    def factors(layer: Any) -> tuple[Any, Any]:
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    pairs = ((factors(one), factors(other)) for one, other in combinations(layers, 2))
    alike = next(((a, b) for a, b in pairs if [x.shape for x in a] == [x.shape for x in b]), None)
    if alike is None:
        raise UserError("mutate: no two adapted matrices have the same shape, plant another fault")
    one, other = alike
    for first, second in zip(one, other, strict=True):
        first.data, second.data = second.data, first.data


@_mutation("logits")
def adapter_parts_exchanged(layers: list[Any]) -> None:
    """Of a matrix that joins several, each part gets what another one's B makes."""

    def exchanged(module: Any, args: Any, made: torch.Tensor) -> torch.Tensor:
        return made.roll(made.shape[-1] // 2, dims=-1)

    _first_linear(layers).lora_B["default"].register_forward_hook(exchanged)


@_mutation("training loss")
def adapter_dropout_left_on(layers: list[Any]) -> None:
    """One matrix has dropout before its A in training."""
    _first_linear(layers).lora_dropout["default"] = torch.nn.Dropout(0.1)


@_mutation("gradients")
def adapter_a_detached(layers: list[Any]) -> None:
    """No gradient flows from the B of one matrix to its A."""
    _first_linear(layers).lora_A["default"].register_forward_hook(lambda module, args, made: made.detach())


def _first_linear(layers: list[Any]) -> Any:
    """The first matrix whose A and B PEFT calls as modules: not those of a parameter."""
    for layer in layers:
        if not hasattr(layer, "parameter_name"):
            return layer
    raise UserError("mutate: the adapters have no matrix that is a module of its own, plant another fault")
