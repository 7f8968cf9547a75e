"""Run either framework on the same weights and tokens, with everything that the comparison looks at."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from convert.to_torch import torch_tensors
from jaxllm.checkpoint import Weights
from jaxllm.config import ModelConfig
from jaxllm.loss import count_targets
from jaxllm.step import abstract_model, summed_loss
from torch_ref import CustomLLM as TorchCustomLLM

DTYPES = {"float32": (jnp.float32, torch.float32), "float64": (jnp.float64, torch.float64)}


class Outputs(NamedTuple):
    hidden: list[np.ndarray]  # L+1 of (B,T,D): embeddings, then behind each layer
    logits: np.ndarray  # (B,T,V)
    loss: float
    experts: np.ndarray  # (L,B,T,k)
    scores: np.ndarray  # (L,B,T,E)


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights on which a mistake shows: norms that are not one, biases that are not zero, experts that differ.

    Matrices spread by `initializer_range` around 0, norm weights by 0.2 around 1, lm_head's bias by 0.02 and the
    routing bias by 0.1, which changes many choices.
    """
    rng = np.random.default_rng(seed)

    def drawn(path, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        keys = [str(getattr(key, "key", "")) for key in path]
        values = rng.standard_normal(leaf.shape, np.float32)
        if any(key.endswith("norm") for key in keys):
            return 1 + 0.2 * values
        if keys[-1] == "routing_bias":
            return 0.1 * values
        return (0.02 if keys[-1] == "bias" else config.initializer_range) * values

    _, params, routing_bias = abstract_model(config)
    return Weights(*jax.tree_util.tree_map_with_path(drawn, (params, routing_bias)))


def jax_forward(
    config: ModelConfig,
    weights: Weights,
    ids: np.ndarray,
    precision: str = "float32",
    experts: np.ndarray | None = None,
) -> Outputs:
    """The Flax model, by the functions that train: ids (B,T); `experts` (L,B,T,k) replaces the routers' choice."""
    dtype, _ = DTYPES[precision]
    # On an accelerator float32 products would run in TF32 or bfloat16 without this.
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        graph, _, _ = abstract_model(config, dtype=dtype)
        params, routing_bias = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tuple(weights))
        outputs = _jax_outputs(graph, params, routing_bias, jnp.asarray(ids), experts)
        embedded, record, logits, loss = jax.device_get(outputs)
    return Outputs([embedded, *record.hidden], logits, float(loss), record.experts, record.scores)


@functools.partial(jax.jit, static_argnums=0)
def _jax_outputs(graph: nnx.GraphDef, params, routing_bias, ids: jax.Array, experts: jax.Array | None):
    model = nnx.merge(graph, params, routing_bias)
    x, record = model.run_layers(ids, experts=experts, keep_hidden=True)
    embedded = model.embed(ids, jnp.arange(ids.shape[1])[None])
    return embedded, record, model.logits(x), summed_loss(model, x, ids) / count_targets(ids)


def torch_model(config: ModelConfig, weights: Weights, precision: str = "float32") -> TorchCustomLLM:
    """The PyTorch model with these weights, through the converter's table."""
    with torch.device("meta"):
        model = TorchCustomLLM(config)
    # copies: a fault planted in one framework must not reach into the other's memory
    state = {t.name: torch.from_numpy(np.array(t.read(), order="C")) for t in torch_tensors(config, weights)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(DTYPES[precision][1]).eval()


@torch.no_grad()
def torch_forward(model: TorchCustomLLM, ids: np.ndarray, experts: np.ndarray | None = None) -> Outputs:
    """The PyTorch model, as a user calls it."""
    tokens = torch.from_numpy(np.asarray(ids, np.int64))
    forced = None if experts is None else torch.from_numpy(np.asarray(experts, np.int64))
    out = model(tokens, labels=tokens, output_hidden_states=True, output_router=True, expert_indices=forced)
    return Outputs(
        hidden=[hidden.numpy() for hidden in out.hidden_states],
        logits=out.logits.numpy(),
        loss=float(out.loss),
        experts=torch.stack(out.router_experts).numpy(),
        scores=torch.stack(out.router_scores).numpy(),
    )


def state_dict_arrays(model: TorchCustomLLM) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}
