"""Planted faults of the DeepSeek family: each makes a transformers model read its files or config.json wrongly.

All are caught by the lowest rung that can see them: weights and files are right, so a part of a layer differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from jaxllm.config import ModelConfig
from parity_tests.hf_side import routers
from parity_tests.mutations import Mutation


class StockMutation(NamedTuple):
    mutation: Mutation
    applies: Callable[[ModelConfig], Any]
    """Whether a model can have the fault."""


STOCK_MUTATIONS: dict[str, StockMutation] = {}


def _mutation(what: str, applies: Callable[[ModelConfig], Any] = lambda config: True) -> Callable[[Callable], Callable]:
    """Register a generator function in STOCK_MUTATIONS as a context manager."""

    def register(function: Callable) -> Callable:
        plant = contextmanager(function)
        STOCK_MUTATIONS[function.__name__] = StockMutation(Mutation(plant, "layers", what), applies)
        return plant

    return register


def _has_yarn(config: ModelConfig) -> bool:
    return config.rope_scaling.factor > 1


def _has_groups(config: ModelConfig) -> bool:
    return config.moe_layers > 0 and config.router.topk_group < config.router.n_group


def _has_bias(config: ModelConfig) -> bool:
    return config.moe_layers > 0 and config.router.has_bias


@contextmanager
def _attributes(modules: list[Any], name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Change an attribute of some modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, name, change(module)))
        yield


def _attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def _mscale(attention: Any) -> float:
    """The square root of what yarn multiplies the attention's scale by."""
    return (attention.scaling * attention.qk_head_dim**0.5) ** 0.5


# attention


@_mutation("attention", lambda config: config.router.has_bias)
def rope_halves_for_pairs(model: Any) -> Iterator[None]:
    """Rotary pairs are read as (i, i + r/2) where the file has (2i, 2i+1), or the reverse."""
    with mock.patch.object(model.config, "rope_interleave", not model.config.rope_interleave):
        yield


@_mutation("attention", lambda config: config.rope_scaling.mscale_all_dim)
def mscale_missing(model: Any) -> Iterator[None]:
    """Yarn does not change the attention's scale."""
    with _attributes(_attentions(model), "scaling", lambda attention: attention.qk_head_dim**-0.5):
        yield


@_mutation("attention", lambda config: config.rope_scaling.mscale_all_dim)
def mscale_on_the_rotation(model: Any) -> Iterator[None]:
    """Yarn's scale multiplies the rotated part alone."""
    rotary = model.model.rotary_emb
    scaled = rotary.attention_scaling * _mscale(_attentions(model)[0])
    with (
        _attributes(_attentions(model), "scaling", lambda attention: attention.qk_head_dim**-0.5),
        mock.patch.object(rotary, "attention_scaling", scaled),
    ):
        yield


@_mutation("attention", _has_yarn)
def rope_not_interpolated(model: Any) -> Iterator[None]:
    """Yarn does not change the rotary frequencies."""
    rotary = model.model.rotary_emb
    r, theta = 2 * len(rotary.inv_freq), model.config.rope_parameters["rope_theta"]
    plain = theta ** (-torch.arange(0, r, 2, dtype=rotary.inv_freq.dtype) / r)
    with mock.patch.dict(rotary._buffers, {"inv_freq": plain}):
        yield


@_mutation("attention", _has_yarn)
def rope_interpolated_everywhere(model: Any) -> Iterator[None]:
    """Yarn divides all frequencies by its factor, without a ramp."""
    rotary = model.model.rotary_emb
    r, rope = 2 * len(rotary.inv_freq), model.config.rope_parameters
    divided = rope["rope_theta"] ** (-torch.arange(0, r, 2, dtype=rotary.inv_freq.dtype) / r) / rope["factor"]
    with mock.patch.dict(rotary._buffers, {"inv_freq": divided}):
        yield


@_mutation("attention")
def scale_of_the_part_without_position(model: Any) -> Iterator[None]:
    """The attention's scale counts the dimensions without position alone."""

    def scale(attention: Any) -> float:
        return attention.qk_nope_head_dim**-0.5 * _mscale(attention) ** 2

    with _attributes(_attentions(model), "scaling", scale):
        yield


@_mutation("attention", lambda config: config.rms_norm_eps != config.latent_norm_eps)
def latent_eps_of_the_other_norms(model: Any) -> Iterator[None]:
    """The norms on latents have `rms_norm_eps` instead of 1e-6."""
    norms = [attention.kv_a_layernorm for attention in _attentions(model)]
    norms += [attention.q_a_layernorm for attention in _attentions(model) if attention.q_a_layernorm is not None]
    with _attributes(norms, "variance_epsilon", lambda norm: model.config.rms_norm_eps):
        yield


@_mutation("attention")
def latents_not_normed(model: Any) -> Iterator[None]:
    """The latent of keys and values has no norm."""
    norms = [attention.kv_a_layernorm for attention in _attentions(model)]
    with _attributes(norms, "forward", lambda norm: lambda x: x):
        yield


# the router


def _route(
    router: Any, x: Tensor, *, bias: bool = True, groups: bool = True, best: int = 2, biased_gates: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3's router, with faults."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.reshape(-1, x.shape[-1]).to(wide), router.weight.to(wide))
    scores = logits.sigmoid()
    ranks = biased = scores + router.e_score_correction_bias * bias
    if groups:
        grouped = ranks.unflatten(-1, (router.num_group, -1))
        worth = grouped.topk(best, dim=-1)[0].sum(dim=-1)
        is_open = torch.zeros_like(worth).scatter(-1, worth.topk(router.topk_group, dim=-1)[1], 1).bool()
        ranks = grouped.masked_fill(~is_open[..., None], -torch.inf).flatten(-2)
    experts = ranks.topk(router.top_k, dim=-1)[1]
    gates = (biased if biased_gates else scores).gather(-1, experts)
    if router.norm_topk_prob:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, gates * router.routed_scaling_factor, experts


@contextmanager
def _routing(model: Any, **faults: Any) -> Iterator[None]:
    with _attributes(routers(model), "forward", lambda router: lambda x: _route(router, x, **faults)):
        yield


@_mutation("expert choice", lambda config: _has_groups(config) and _has_bias(config))
def groups_ignored(model: Any) -> Iterator[None]:
    """A token may choose from all groups."""
    with _routing(model, groups=False):
        yield


@_mutation("expert choice", lambda config: _has_groups(config) and _has_bias(config))
def group_by_its_best(model: Any) -> Iterator[None]:
    """A group is worth its best expert instead of its two best."""
    with _routing(model, best=1):
        yield


@_mutation("expert choice", _has_bias)
def bias_ignored(model: Any) -> Iterator[None]:
    """The correction bias does not change the choice."""
    with _routing(model, bias=False):
        yield


@_mutation("gates", _has_bias)
def bias_in_the_gates(model: Any) -> Iterator[None]:
    """The correction bias is a part of the gates."""
    with _routing(model, biased_gates=True):
        yield


@_mutation("gates", lambda config: config.moe_layers and config.router.routed_scaling_factor != 1)
def scaling_factor_missing(model: Any) -> Iterator[None]:
    """The gates are not multiplied by `routed_scaling_factor`."""
    with _attributes(routers(model), "routed_scaling_factor", lambda router: 1.0):
        yield


@_mutation("gates", _has_bias)
def gates_renormalized_otherwise(model: Any) -> Iterator[None]:
    """The gates are not normalized to 1 where they should be, or are where they should not."""
    with _attributes(routers(model), "norm_topk_prob", lambda router: not router.norm_topk_prob):
        yield


@_mutation("expert choice", lambda config: config.router.topk_method == "group_limited_greedy")
def groups_of_v2_ignored(model: Any) -> Iterator[None]:
    """DeepSeek-V2's groups are not closed."""
    with _attributes(routers(model), "topk_method", lambda router: "greedy"):
        yield


# the feed-forward networks


@_mutation("experts", lambda config: config.moe_layers)
def shared_experts_missing(model: Any) -> Iterator[None]:
    """The shared experts are not added."""
    shared = [layer.mlp.shared_experts for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    with _attributes(shared, "forward", lambda module: torch.zeros_like):
        yield


@_mutation("experts", lambda config: config.dense_layers)
def dense_gate_and_up_exchanged(model: Any) -> Iterator[None]:
    """In dense layers the activation is applied to `up_proj`."""
    dense = [layer.mlp for layer in model.model.layers if not hasattr(layer.mlp, "gate")]

    def exchanged(mlp: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))

    with _attributes(dense, "forward", exchanged):
        yield
