"""transformers' own models of the DeepSeek family, with what the ladder uses of `torch_ref.CustomLLM`.

Nothing of their mathematics is replaced. What transformers computes in float32 whatever the model's dtype is (norms,
router, softmax, angles, loss) is float64 in a float64 model here, else no comparison would be better than 2e-7.
"""

from __future__ import annotations

import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, modeling_rope_utils

from convert.mapping import PARAMS, entries
from convert.to_torch import write_model
from jaxllm.config import ModelConfig
from jaxllm.config.families import family_of
from jaxllm.errors import UserError, shown
from jaxllm.model.decoder import abstract_model
from jaxllm.store.checkpoint import Weights
from parity_tests.engine.planting import with_values
from parity_tests.recording import recorded
from torch_ref.model import CACHE, no_autocast
from torch_ref.muon import Blocks
from torch_ref.step import ROUTING_BIASES

Named = dict[str, np.ndarray]

LAYER_PARTS = {
    "input_layernorm": "input norm", "self_attn": "attention", "post_attention_layernorm": "post-attention norm",
    "mlp": "experts",
}  # fmt: skip


class _Float64Torch:
    """`torch`, whose float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def float32_is_float64(kind: type) -> Iterator[None]:
    """What the module of a model's class asks for in float32 is float64 in this context."""
    proxy = _Float64Torch()
    with (
        mock.patch.object(sys.modules[kind.__module__], "torch", proxy),
        mock.patch.object(modeling_rope_utils, "torch", proxy),
        mock.patch.object(Tensor, "float", Tensor.double),
    ):
        yield


def stock_model(
    config: ModelConfig,
    weights: Weights,
    precision: str = "float32",
    source: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Any:
    """The stock transformers model with these weights, loaded as a user loads it: from their own folder, or an export.

    Args:
        source: the config.json that the weights came with.
        folder: that they came with; None: they are exported first, as are weights that need a GPU in transformers.

    Raises:
        UserError: transformers finds keys that are missing, unexpected or mismatched.
    """
    kind = getattr(transformers, family_of(config, source).architecture)
    options: Any = {"attn_implementation": "eager", "experts_implementation": "eager", "output_loading_info": True}
    with tempfile.TemporaryDirectory() as scratch, _lifted(kind, precision == "float64"):
        if folder is None or not loads_itself(source):
            folder = Path(scratch)
            write_model(config, weights, folder, "float32", source)
        dtype = torch.float64 if precision == "float64" else torch.float32
        model, info = kind.from_pretrained(folder, dtype=dtype, **options)
    beyond = {name for name in info["unexpected_keys"] if _passed_over(name, config.num_hidden_layers)}
    info["unexpected_keys"] = set(info["unexpected_keys"]) - beyond
    if faults := {name: sorted(map(str, keys)) for name, keys in info.items() if keys}:
        raise UserError(f"{kind.__name__} of transformers does not take the weights of {folder}: {shown(faults)}")
    model.model.embed_tokens.padding_idx = None  # else that row takes no gradient
    _adapt(model, config)
    return model.eval()


def loads_itself(source: Mapping[str, Any] | None) -> bool:
    """Whether transformers reads a folder with this config.json on a CPU: not if it is quantized."""
    return not (source or {}).get("quantization_config")


def _passed_over(name: str, layers: int) -> bool:
    """Whether `convert` passes over a tensor of that name: of a layer beyond the model's, or a table of angles."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return name.endswith(".rotary_emb.inv_freq") or (layer is not None and int(layer[1]) >= layers)


def is_stock(model: Any) -> bool:
    return isinstance(model, PreTrainedModel) and type(model).__module__.startswith("transformers.")


@contextmanager
def _lifted(kind: type, float64: bool) -> Iterator[None]:
    if not float64:
        yield
        return
    with float32_is_float64(kind):
        yield


@contextmanager
def with_biases(model: Any, change: Callable[[Tensor], np.ndarray]) -> Iterator[None]:
    """In this context the routing biases of either model have other values."""
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(ROUTING_BIASES)]
    with with_values([(bias, lambda bias: torch.from_numpy(change(bias))) for bias in buffers]):
        yield


def routers(model: Any) -> list[Any]:
    """The routers of the layers that have experts."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def _adapt(model: Any, config: ModelConfig) -> None:
    """Let `forward` take a mask without positions, and return the routing with `output_router`, as CustomLLM's does."""
    run = model.forward
    for router in routers(model):
        router.forward = _without_autocast(router.forward)

    @functools.wraps(run)
    def forward(input_ids=None, attention_mask=None, position_ids=None, output_router=False, **options):
        if attention_mask is not None and attention_mask.ndim == 2 and position_ids is None:
            position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        double = model.dtype == torch.float64
        with recorded([(router, "routing") for router in routers(model)]) as made, _lifted(type(model), double):
            output = run(input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)
        if output_router:
            routing = made.get("routing", [])  # logits (N,E), gates (N,k) and experts (N,k) of each router
            in_time = (*input_ids.shape, -1)
            logits = tuple(logits.reshape(in_time) for logits, _, _ in routing)
            output.router_logits = logits
            sigmoid = config.router.scoring_func == "sigmoid"
            output.router_scores = tuple(z.sigmoid() if sigmoid else z.softmax(dim=-1) for z in logits)
            output.router_experts = tuple(experts.reshape(in_time) for _, _, experts in routing)
        return output

    model.forward = forward


def _without_autocast(run):
    """Under autocast, as without it, the router is computed in float32."""

    @functools.wraps(run)
    def forward(x: Tensor):
        with no_autocast(x):
            return run(x)

    return forward


def part_modules(model: Any) -> list[tuple[Any, str]]:
    """The modules whose outputs are compared, each with the name of its part."""
    modules = [(model.model.embed_tokens, "embeddings"), *((layer, "residual") for layer in model.model.layers)]
    modules += [(getattr(layer, name), part) for layer in model.model.layers for name, part in LAYER_PARTS.items()]
    return modules + [(router, "routing") for router in routers(model)]


def dense_gates(gates: Tensor, experts: Tensor, n_experts: int) -> Tensor:
    """(N,k) gates of (N,k) experts as (N,E), zero where an expert is not chosen."""
    return gates.new_zeros(len(gates), n_experts).scatter(-1, experts, gates)


def in_file(values: Named) -> Named:
    """Arrays by their names in memory -> by their names in files, where each expert has its own."""
    named: Named = {}
    for name, value in values.items():
        base, _, last = name.rpartition(".")
        if not base.endswith(".experts"):
            named[name] = value
            continue
        for j, expert in enumerate(value):
            if last == "down_proj":
                named[f"{base}.{j}.down_proj.weight"] = expert
            else:
                gate, up = np.split(expert, 2)
                named |= {f"{base}.{j}.gate_proj.weight": gate, f"{base}.{j}.up_proj.weight": up}
    return named


def in_memory(name: str, values: Named, experts: int) -> np.ndarray:
    """One array by its name in memory, of arrays by their names in files: the inverse of `in_file`."""
    base, _, last = name.rpartition(".")
    if not base.endswith(".experts"):
        return values[name]
    parts = ("down_proj",) if last == "down_proj" else ("gate_proj", "up_proj")
    return np.stack([np.concatenate([values[f"{base}.{j}.{part}.weight"] for part in parts]) for j in range(experts)])


def joined_matrices(model: Any, config: ModelConfig, interleaved: bool) -> dict[str, Blocks]:
    """The parameters, by their names in memory, that join what Flax keeps as several matrices."""
    found: dict[str, Blocks] = {}
    for entry in entries(config, interleaved):
        if len(entry.parts) > 1:
            rows = np.arange(entry.shape({PARAMS: abstract_model(config)[1]})[entry.axis])
            found[entry.torch_name] = [(entry.axis, torch.from_numpy(rows[part.where])) for part in entry.parts]
    for name, parameter in model.named_parameters():
        if name.endswith(".experts.gate_up_proj"):  # (E,2F,D)
            found[name] = [(1, half) for half in torch.arange(parameter.shape[1]).chunk(2)]
    return found


class Cached(NamedTuple):
    """What transformers caches of tokens (B,T), rotary pairs being (i, i + r/2), and the experts that were chosen."""

    latents: np.ndarray  # (L,B,T,R)
    keys: np.ndarray  # (L,B,T,r)
    experts: np.ndarray | None  # (L,B,T,k)


def cached_latents(model: Any, ids: np.ndarray) -> Cached:
    with torch.no_grad():
        out = model(torch.from_numpy(np.asarray(ids, np.int64)), use_cache=True, output_router=True)
    cached = ([getattr(layer, kind)[:, 0] for layer in out[CACHE].layers] for kind in ("keys", "values"))
    latents, keys = (torch.stack(layers).to(model.dtype).numpy() for layers in cached)
    if model.config.model_type == "deepseek_v2":  # it leaves the rotated pairs where they were
        keys = np.concatenate([keys[..., ::2], keys[..., 1::2]], axis=-1)
    return Cached(latents, keys, torch.stack(out.router_experts).numpy() if out.router_experts else None)
