"""Planted faults: each changes the PyTorch side as a real mistake would, so that a test can see the comparison fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

import torch_ref.model as reference
from torch_ref import CustomLLM


@contextmanager
def rope_halves_swapped(model: CustomLLM) -> Iterator[None]:
    """The pairs rotate the other way round, as if the two halves of the rotary dimensions were exchanged."""

    def swapped(self, x: Tensor, positions: Tensor) -> Tensor:
        first, second = rotate(self, torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), positions).chunk(2, dim=-1)
        return torch.cat([second, first], dim=-1)

    rotate = reference.RotaryEmbedding.forward
    with mock.patch.object(reference.RotaryEmbedding, "forward", swapped):
        yield


@contextmanager
def norm_weight_dropped(model: CustomLLM) -> Iterator[None]:
    """One norm forgets to multiply by its weight."""
    weight = model.decoder_layers[-1].post_attn_norm.weight
    with _changed(weight, torch.ones_like(weight)):
        yield


@contextmanager
def gate_biased(model: CustomLLM) -> Iterator[None]:
    """The gates use the score with the routing bias, which may only steer the choice."""
    route = reference.route

    def biased(x, router_weight, routing_bias, experts_per_token, experts=None):
        routing = route(x, router_weight, routing_bias, experts_per_token, experts)
        chosen = (routing.scores + routing_bias).gather(-1, routing.experts)
        return routing._replace(gates=chosen / chosen.sum(dim=-1, keepdim=True))

    with mock.patch.object(reference, "route", biased):
        yield


@contextmanager
def experts_exchanged(model: CustomLLM) -> Iterator[None]:
    """Two routed experts of the last layer stand in each other's place."""
    experts = model.decoder_layers[-1].mlp.routed_experts
    order = [1, 0, *range(2, len(experts))]
    originals = list(experts)
    for i, j in enumerate(order):
        experts[i] = originals[j]
    try:
        yield
    finally:
        for i, expert in enumerate(originals):
            experts[i] = expert


@contextmanager
def future_visible(model: CustomLLM) -> Iterator[None]:
    """The mask lets every token see the one after it."""

    def leaky(length, past, attention_mask, device):
        return torch.ones(1, 1, length, past + length, dtype=torch.bool, device=device).tril(past + 1)

    with mock.patch.object(reference, "causal_mask", leaky):
        yield


@contextmanager
def position_off_by_one(model: CustomLLM) -> Iterator[None]:
    """Positions count from one."""
    rows = model.position_embeddings.weight
    with _changed(rows, rows.roll(-1, dims=0)):
        yield


@contextmanager
def labels_not_shifted(model: CustomLLM) -> Iterator[None]:
    """The loss scores each position on the token that it has already seen: the source's mistake."""

    def unshifted(logits: Tensor, labels: Tensor, num_items=None) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    with mock.patch.object(reference, "next_token_loss", unshifted):
        yield


@contextmanager
def _changed(parameter: Tensor, value: Tensor) -> Iterator[None]:
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(original)


# The fault, and the first row of the report that must catch it.
MUTATIONS: dict[str, tuple[Callable, str]] = {
    "rope_halves_swapped": (rope_halves_swapped, "layer 0"),
    "norm_weight_dropped": (norm_weight_dropped, "weights"),
    "gate_biased": (gate_biased, "layer 0"),
    "experts_exchanged": (experts_exchanged, "weights"),
    "future_visible": (future_visible, "layer 0"),
    "position_off_by_one": (position_off_by_one, "weights"),
    "labels_not_shifted": (labels_not_shifted, "loss"),
}
