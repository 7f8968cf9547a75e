"""A stack of layers as a scan over them takes it: what the scan cuts into layers, and experts that it does not cut."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels import Kernels
from jaxllm.model.kernels.expert_ffn import prepare
from jaxllm.model.kernels.stacks import Carried
from jaxllm.model.layer import DecoderLayer
from jaxllm.model.moe import InStack

EXPERTS = ("routed_experts", "shared_experts")
"""The attributes of DeepSeekMoE that are stacks of experts."""


class LayerStack(NamedTuple):
    """Layers as arrays."""

    graph: nnx.GraphDef  # of one layer
    experts: nnx.State  # those of all layers that stay apart, (L*E,...)
    others: nnx.State  # (L,...)
    layers: int
    experts_per_layer: dict[str, int]  # of those that stay apart

    def prepared(self, kernels: Kernels, dtype: jnp.dtype) -> nnx.State:
        """The experts that stay apart, as the grouped products read them."""
        return prepare(kernels.grouped, self.experts, dtype)

    def in_stacks(self, layer: Array, carried: dict[str, Carried], remat: bool = False) -> dict[str, InStack]:
        """Where the experts of a layer are."""
        return {name: InStack(layer * n, n, carried[name], remat) for name, n in self.experts_per_layer.items()}

    def first_carried(self, kernels: Kernels, tokens: int, rows: int, dtype: jnp.dtype) -> dict[str, Carried]:
        """What the first layer is given.

        Args:
            tokens: N of this device.
            rows: M of its routed experts, which get tokens of all devices along `expert`.
        """
        carried = {}
        for name, per_layer in self.experts_per_layer.items():
            experts, kept = nnx.to_pure_dict(self.experts)["mlp"][name], None
            gate, up, down = (experts[projection]["weight"] for projection in ("gate_proj", "up_proj", "down_proj"))
            if kernels.shared:  # each shared expert keeps its own, and a layer's routed ones together
                parts, size = (per_layer, tokens) if name == "shared_experts" else (1, rows)
                kept = kernels.grouped.new_kept(self.layers * parts, size, 2 * gate.shape[2], dtype)
            carried[name] = Carried((gate, up, down), kept)
        return carried


def split_layers(layers: DecoderLayer, apart: Sequence[str]) -> LayerStack:
    """A stack of layers. A scan copies each layer's part of it, so some experts, most of all weights, stay apart."""
    graph, experts, others = nnx.split(layers, nnx.Any(*map(nnx.PathContains, apart)), ...)
    parts = nnx.to_pure_dict(experts).get("mlp", {})
    per_layer = {name: parts[name]["gate_proj"]["weight"].shape[1] for name in apart if name in parts}
    flat = jax.tree.map(lambda weight: weight.reshape(-1, *weight.shape[2:]), experts)
    return LayerStack(graph, flat, others, len(jax.tree.leaves(others)[0]), per_layer)
