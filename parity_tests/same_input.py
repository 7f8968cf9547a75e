"""Each part of each layer in bfloat16, on the same input in both frameworks: what is computed in float32 there.

Through a whole model in bfloat16 every part differs by the roundings of all parts before it, which hide a router, a
norm, a softmax or rotary angles that lose float32. Here PyTorch's parts get what JAX's parts got, and twice: in
bfloat16 (under autocast) and in float32. The second tells how much rounding explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_ref.model as reference
from parity_tests import hf_side
from parity_tests.compare import ANY, ISLAND, Row, Tolerance, compare_arrays
from parity_tests.engine.rows import relative_l2
from parity_tests.forward import LAYER_PARTS, Trace, torch_precision
from parity_tests.recording import first, recorded

ROUNDED_ONCE = 1.15
"""A part that rounds its float32 result once may differ from that result by this many times that rounding."""

ROUNDINGS = {"attention": 0.7, "rotated keys": 0.25, "experts": 3.0}
"""By how many times PyTorch's own rounding a part may differ that rounds several times. The experts' roundings are at
other places: JAX rounds after the gate, PyTorch before it."""

STOCK_ROUNDINGS = {"attention": 3.0, "experts": 3.0}
"""transformers' models round the scores of attention, too."""


ORDER = (
    "input norm", "rotated keys", "attention", "post-attention norm", "router logits", "router scores", "gates",
    "experts",
)  # fmt: skip
"""Of the computation."""


class Fed(NamedTuple):
    """What PyTorch's parts return for given inputs."""

    parts: dict[str, list[np.ndarray]]  # each L times (B,T,D|E), in float32
    head_input: Tensor  # (B,T,D)


def same_input_rows(model: Any, ours: Trace, ids: np.ndarray) -> list[Row]:
    """Compare all parts of a bfloat16 trace of JAX (B,T) with PyTorch's on the same inputs."""
    rounded, exact = (_fed(model, ours, ids, precision) for precision in ("bfloat16", "float32"))
    limits = STOCK_ROUNDINGS if hf_side.is_stock(model) else ROUNDINGS
    made = {name: _numbers(values) for name, values in ours.parts.items()}
    if ours.keys is not None:
        made["rotated keys"] = _numbers(ours.keys)
    rows = []
    for i in range(len(made["residual"])):
        for part in ORDER:
            of_layers = exact.parts.get(part, [])
            at = i - len(made["residual"]) + len(of_layers)  # a router's are of the layers that have experts
            if at < 0:
                continue
            reference_values, values = of_layers[at], made[part][at]
            if part in ("router logits", "router scores", "gates"):
                tolerance, other = ISLAND, reference_values
            elif part in limits:
                other = rounded.parts[part][at]
                own = limits[part] * relative_l2(reference_values, other)
                tolerance = Tolerance(f"{limits[part]:g} of rounding", own, ANY, "that of PyTorch on the same input")
            else:
                other = reference_values
                own = ROUNDED_ONCE * relative_l2(other, _bfloat16(other))
                tolerance = Tolerance("rounded once", own, ANY, "float32 inside, one rounding at the end")
            rows.append(compare_arrays("parts", part, f"layer {i}", other, values.reshape(other.shape), tolerance))
    return rows + _head_rows(model, ours, exact.head_input, ids)


def _head_rows(model: Any, ours: Trace, x: Tensor, ids: np.ndarray) -> list[Row]:
    """Logits and loss are float32, of products of bfloat16 numbers."""
    head: nn.Linear = model.lm_head
    with torch.no_grad():
        logits = F.linear(x.bfloat16().float(), head.weight.bfloat16().float(), head.bias)
        tokens = torch.from_numpy(np.asarray(ids, np.int64))
        rows = [compare_arrays("parts", "logits", "", logits.numpy(), _numbers(ours.logits), ISLAND_LOGITS)]
        if ids.shape[1] > 1:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            one, other = np.asarray([float(loss)]), np.asarray([ours.loss])
            rows.append(compare_arrays("parts", "loss", "", one, other, ISLAND._replace(relative_l2=2e-5)))
    return rows


ISLAND_LOGITS = Tolerance("float32 of bfloat16", 3e-4, ANY, "few elements of the input round to the other neighbour")


@torch.no_grad()
def _fed(model: Any, ours: Trace, ids: np.ndarray, precision: str) -> Fed:
    """Run PyTorch's model in which every part gets the input that JAX's had."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(_numbers(values)).to(dtype)

    stock = hf_side.is_stock(model)
    layers = model.model.layers if stock else model.decoder_layers
    named = hf_side.LAYER_PARTS if stock else LAYER_PARTS
    stream = [ours.embeddings, *ours.parts["residual"]]
    inputs: list[tuple[nn.Module, Tensor]] = []
    rotary: list[tuple[nn.Module, str]] = []
    for i, layer in enumerate(layers):
        of_part = {part: getattr(layer, name) for name, part in named.items()}
        inputs += [(layer, tensor(stream[i])), (of_part["attention"], tensor(ours.parts["input norm"][i]))]
        attended = tensor(stream[i]).bfloat16() + tensor(ours.parts["attention"][i]).bfloat16()
        inputs += [
            (of_part["post-attention norm"], attended.to(dtype)),
            (of_part["experts"], tensor(ours.parts["post-attention norm"][i])),
        ]
        rotary += [] if stock else [(of_part["attention"].rotary_emb, "rotated keys")]
    norm = (model.model if stock else model)._modules.get("norm" if stock else "final_norm")
    inputs.append((model.lm_head if norm is None else norm, tensor(stream[-1])))
    parts = [(getattr(layer, name), part) for layer in layers for name, part in named.items()] + rotary
    parts += [(router, "routing") for router in (hf_side.routers(model) if stock else _routers(layers))]
    heads: list[Tensor] = []
    watch = model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    try:
        with recorded(parts) as outputs, fed(inputs), torch_precision(precision):
            model(torch.from_numpy(np.asarray(ids, np.int64)))
    finally:
        watch.remove()
    routing = outputs.pop("routing")
    made = {part: [first(output) for output in of_layers] for part, of_layers in outputs.items()}
    if not stock:
        made["rotated keys"] = made["rotated keys"][::2]  # of each layer its keys, then its queries
    made |= _routing_parts(model, layers, routing, ours, stock)
    return Fed({part: [_numbers(v.float().numpy()) for v in of_layers] for part, of_layers in made.items()}, heads[0])


def _routers(layers: Iterable[Any]) -> list[nn.Module]:
    return [layer.mlp.router for layer in layers]


def _routing_parts(model: Any, layers: Any, routing: list[Any], ours: Trace, stock: bool) -> dict[str, list[Tensor]]:
    """Router logits, scores and gates (N,E), with the experts that JAX chose."""
    if not routing:
        return {}
    E = model.config.n_routed_experts
    if stock:
        return {"router logits": [logits for logits, _, _ in routing]}
    made: dict[str, list[Tensor]] = {"router logits": routing, "router scores": [], "gates": []}
    for layer, logits, experts in zip(layers, routing, ours.experts, strict=True):
        chosen = torch.from_numpy(np.asarray(experts, np.int64)).flatten(0, 1)
        routed = reference.route(logits, layer.mlp.routing_bias, chosen.shape[-1], chosen)
        made["router scores"].append(routed.scores)
        made["gates"].append(hf_side.dense_gates(routed.gates, chosen, E))
    return made


@contextmanager
def fed(inputs: Iterable[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """In this context modules get these tensors instead of their first argument."""

    def feeder(value: Tensor):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
            return ((value, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": value})

        return hook

    with ExitStack() as stack:
        for module, value in inputs:
            stack.callback(module.register_forward_pre_hook(feeder(value), with_kwargs=True).remove)
        yield


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()
