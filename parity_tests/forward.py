"""Run either framework on the same weights and tokens, and record the output of every part of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from convert.adapter import PREFIX, adapted
from convert.mapping import PARAMS, ROUTING_BIAS, entries
from convert.to_torch import torch_tensors
from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.config.families import names_of
from jaxllm.model.decoder import abstract_adapted, abstract_model
from jaxllm.model.dtypes import Pytree
from jaxllm.store.checkpoint import Weights
from jaxllm.train.loss import count_targets
from jaxllm.train.state import frozen_dtypes
from jaxllm.train.step import merged, summed_loss
from parity_tests import hf_side
from parity_tests.recording import first, recorded
from torch_ref import CustomLLM as TorchCustomLLM

DTYPES = {"float64": jnp.float64, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Compute dtypes. Weights are float64 in the first and float32 in both others."""

PARTS = ("input norm", "attention", "post-attention norm", "router scores", "experts", "residual")
"""The parts of a layer of CustomLLM in computation order; the expert choice comes after the router scores."""

LAYER_PARTS = {
    "input_norm": "input norm", "self_attn": "attention", "post_attn_norm": "post-attention norm", "mlp": "experts",
}  # fmt: skip
"""The modules of a layer of CustomLLM that return a part."""

STOCK_PARTS = ("input norm", "attention", "post-attention norm", "router logits", "gates", "experts", "residual")
"""Those of a transformers model, whose router returns gates and no scores."""

ROUTER_PARTS = ("router logits", "router scores", "gates")
"""Parts of the layers that have experts alone."""


QUERIES_AND_KEYS = {"kv_proj_d", "q_proj_d", "k_proj_u", "q_proj_u", "rope_k", "rope_q"}
"""The matrices that make queries and keys."""

QUERY_KEY_GAIN = 1.25
"""By how much each of them enlarges its input in random weights: the scores of attention then have a deviation of 2."""


class Base(NamedTuple):
    """What adapters belong to; the parameters beside it are the adapters alone."""

    lora: LoraConfig
    frozen: Pytree
    """All weights of the model, in float32."""


class Trace(NamedTuple):
    """A forward pass on tokens (B,T)."""

    embeddings: np.ndarray  # (B,T,D)
    parts: dict[str, np.ndarray]  # each (L,B,T,D|E); the router's are of the layers that have experts
    experts: np.ndarray  # (L,B,T,k), the choice in the layers that have experts
    logits: np.ndarray  # (B,T,V)
    loss: float
    keys: np.ndarray | None = None  # (L,B,T,G,r), rotated; of JAX alone


@contextmanager
def jax_precision(precision: str):
    """Enable float64 if requested; disable TF32 and bfloat16 products in float32, on any device."""
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        yield


def torch_precision(precision: str):
    """bfloat16 as in the Trainer: float32 weights under autocast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights that reveal errors: norm weights that are not one, biases that are not zero, experts that differ.

    Standard deviations: 0.2 (around 1) for norm weights, 0.3 for biases, 0.1 for the routing bias, which changes many
    choices, and 1 for embeddings. A matrix halves the size of its input. One that makes queries or keys enlarges it, so
    that attention is far from even: nearly even attention hides faults of the rotation and of the softmax.
    """
    rng = np.random.default_rng(seed)

    def drawn(path, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = [str(getattr(key, "key", "")) for key in path]
        values = rng.standard_normal(leaf.shape, np.float32)
        if any(key.endswith("norm") for key in keys):
            return 1 + 0.2 * values
        if "bias" in keys[-1]:
            return (0.1 if keys[-1] == "routing_bias" else 0.3) * values
        if keys[0].endswith("embeddings"):
            return values
        return values * (QUERY_KEY_GAIN if QUERIES_AND_KEYS & {*keys} else 0.5) * leaf.shape[-2] ** -0.5

    _, params, routing_bias = abstract_model(config)
    return Weights(*jax.tree_util.tree_map_with_path(drawn, (params, routing_bias)))


def torch_model(
    config: ModelConfig,
    weights: Weights,
    precision: str = "float32",
    source: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Any:
    """The PyTorch model with these weights: torch_ref's CustomLLM, mapped by the converter's table, or transformers'.

    Args:
        source: the config.json that the weights came with.
        folder: that the weights came with; transformers reads it too.
    """
    if names_of(config) == "deepseek":
        return hf_side.stock_model(config, weights, precision, source, folder)
    with torch.device("meta"):
        model = TorchCustomLLM(config)
    # copies: a fault planted in one framework must not change the other's weights
    state = {t.name: torch.from_numpy(np.array(t.read(), order="C")) for t in torch_tensors(config, weights)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(torch.float64 if precision == "float64" else torch.float32).eval()


def state_dict_arrays(model: TorchCustomLLM) -> dict[str, np.ndarray]:
    """The model's state with the names of files, without names that share a tensor and without frozen weights."""
    left_out = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if model.config.tie_word_embeddings:
        left_out.add("lm_head.weight")
    state = {name: value.numpy() for name, value in model.state_dict().items() if name not in left_out}
    return hf_side.in_file(state) if hf_side.is_stock(model) else state


def torch_named(config: ModelConfig, params, routing_bias=None, interleaved: bool = True) -> dict[str, np.ndarray]:
    """Flax trees with PyTorch's names and layout; views, if the leaves are NumPy arrays.

    Adapters have the names of their parameters in PEFT's model.
    """
    trees = {PARAMS: params, ROUTING_BIAS: routing_bias}
    host = jax.tree.map(np.asarray, {name: tree for name, tree in trees.items() if tree is not None})
    named = {e.torch_name: e.to_torch(host) for e in entries(config, interleaved) if e.lies_in(host)}
    factors = (factor for one in adapted(config, host.get(PARAMS, {}), interleaved) for factor in (one.a, one.b))
    return named | {_in_memory(factor.torch_name): factor.to_torch(host) for factor in factors}


def _in_memory(name: str) -> str:
    """The name of an adapter's tensor in a file of PEFT -> in its model."""
    return name.removeprefix(PREFIX).removesuffix("weight") + "default.weight"


def model_graph(config: ModelConfig, precision: str, base: Base | None = None, **options: Any) -> nnx.GraphDef:
    """The static part of the Flax model; call it within `jax_precision`."""
    if base is not None:
        return abstract_adapted(config, base.lora, dtype=DTYPES[precision], **options).graph
    return abstract_model(config, dtype=DTYPES[precision], **options)[0]


def jax_frozen(config: ModelConfig, base: Base | None, precision: str) -> Pytree:
    """New arrays of the frozen weights in the dtypes of the run; in float64, if the model computes in it."""
    if base is None:
        return {}
    if precision == "float64":
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float64), base.frozen)
    return jax.tree.map(jnp.array, base.frozen, frozen_dtypes(config, base.lora))


def jax_weights(weights: Weights, precision: str) -> tuple:
    """Parameters and routing bias in the dtype of the model's weights; call it within `jax_precision`."""
    master = jnp.promote_types(DTYPES[precision], jnp.float32)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, master), tuple(weights))


def jax_trace(
    config: ModelConfig,
    weights: Weights,
    ids: np.ndarray,
    precision: str = "float32",
    experts: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    base: Base | None = None,
) -> Trace:
    """Run the Flax model with the functions that train: ids (B,T).

    Args:
        experts: (L,B,T,k), replaces the routers' choice.
        mask: (B,T), zero at padding.
        base: of adapters, which the weights then are.
    """
    run = _as_written if precision == "bfloat16" else _jax_outputs
    with jax_precision(precision):
        graph, frozen = model_graph(config, precision, base), jax_frozen(config, base, precision)
        outputs = run(graph, *jax_weights(weights, precision), frozen, jnp.asarray(ids), experts, mask)
        embeddings, trace, logits, loss = jax.device_get(outputs)
    parts = {
        "input norm": trace.input_norm, "attention": trace.attention, "post-attention norm": trace.post_attn_norm,
        "experts": trace.mixture, "residual": trace.residual,
    }  # fmt: skip
    chosen = np.zeros((0, *ids.shape, config.num_experts_per_tok), np.int32)
    if trace.routing is not None:
        in_time = (config.moe_layers, *ids.shape, -1)
        routing = trace.routing
        gates = np.zeros_like(routing.scores)
        np.put_along_axis(gates, routing.experts, routing.gates, axis=-1)
        router = {"router scores": routing.scores, "router logits": routing.logits, "gates": gates}
        parts |= {name: values.reshape(in_time) for name, values in router.items()}
        chosen = routing.experts.reshape(in_time)
    return Trace(embeddings, parts, chosen, logits, float(loss), trace.latents.k_rope)


def _outputs(
    graph: nnx.GraphDef, params, routing_bias, frozen, ids: jax.Array, experts: jax.Array | None, mask: jax.Array | None
):
    model = merged(graph, params, routing_bias, frozen)
    x, record = model.hidden_states(ids, mask, experts=experts, keep_trace=True)
    embeddings = model.embed(ids, jnp.arange(ids.shape[1])[None])
    return embeddings, record.trace, model.logits(x), summed_loss(model, x, ids) / count_targets(ids)


_jax_outputs = jax.jit(_outputs, static_argnums=0)
_as_written = jax.jit(_outputs, static_argnums=0, compiler_options={"xla_allow_excess_precision": False})
"""Each value is rounded where the code says so: by default XLA leaves out a rounding that is undone at once."""


@torch.no_grad()
def torch_trace(
    model: TorchCustomLLM,
    ids: np.ndarray,
    precision: str = "float32",
    experts: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> Trace:
    """Run the PyTorch model as a user calls it; hooks record its parts. Arguments as in `jax_trace`."""
    tokens = torch.from_numpy(np.asarray(ids, np.int64))
    padding = None if mask is None else torch.from_numpy(np.asarray(mask, np.int64))
    if hf_side.is_stock(model):
        return _stock_trace(model, tokens, precision, padding)
    options: dict[str, Any] = {"output_hidden_states": True, "output_router": True, "attention_mask": padding}
    if experts is not None:
        options["expert_indices"] = torch.from_numpy(np.asarray(experts, np.int64))
    modules = [(getattr(layer, name), part) for layer in model.decoder_layers for name, part in LAYER_PARTS.items()]
    with recorded(modules) as outputs, torch_precision(precision):
        out = model(tokens, labels=tokens, **options)
    made = {part: [first(output) for output in of_layers] for part, of_layers in outputs.items()}
    made["router scores"] = list(out.router_scores)
    made["residual"] = list(out.hidden_states[1:])
    return Trace(
        embeddings=out.hidden_states[0].float().numpy() if precision == "bfloat16" else out.hidden_states[0].numpy(),
        parts={part: _stacked(made[part]) for part in PARTS},
        experts=torch.stack(out.router_experts).numpy(),
        logits=out.logits.numpy(),
        loss=float(out.loss),
    )


def _stock_trace(model: Any, tokens: torch.Tensor, precision: str, mask: torch.Tensor | None) -> Trace:
    with torch.no_grad(), recorded(hf_side.part_modules(model)) as outputs, torch_precision(precision):
        out = model(tokens, labels=tokens, attention_mask=mask)
    routing, E = outputs.pop("routing", []), getattr(model.config, "n_routed_experts", 0)
    made = {part: [first(output) for output in of_layers] for part, of_layers in outputs.items()}
    made["router logits"] = [logits for logits, _, _ in routing]
    made["gates"] = [hf_side.dense_gates(gates, experts, E) for _, gates, experts in routing]
    parts = {
        part: _stacked(made[part]).reshape(len(made[part]), *tokens.shape, -1) for part in STOCK_PARTS if made[part]
    }
    experts = [experts.reshape(*tokens.shape, -1) for _, _, experts in routing]
    chosen = torch.stack(experts).numpy() if experts else np.zeros((0, *tokens.shape, 1), np.int64)
    return Trace(_stacked(made["embeddings"])[0], parts, chosen, _stacked([out.logits])[0], float(out.loss))


def _stacked(tensors: list[torch.Tensor]) -> np.ndarray:
    stacked = torch.stack(tensors)
    return (stacked.float() if stacked.dtype == torch.bfloat16 else stacked).numpy()
