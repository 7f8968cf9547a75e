"""The one table of names: which PyTorch tensor is which slice of which Flax array. Both directions read it.

Flax stacks the layers, and within them the experts, along leading axes, and keeps a linear weight as (in, out);
PyTorch has a tensor for each of them, as (out, in).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import ModelConfig

Pytree = Any

PARAMS = "params"
ROUTING_BIAS = "routing_bias"

LINEARS = (
    "self_attn.kv_proj_d", "self_attn.q_proj_d", "self_attn.k_proj_u", "self_attn.v_proj_u", "self_attn.q_proj_u",
    "self_attn.rope_k", "self_attn.rope_q", "self_attn.o_proj", "mlp.router",
)  # fmt: skip
NORMS = ("input_norm", "post_attn_norm")
EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")


class Entry(NamedTuple):
    """One PyTorch tensor and the place of its values in Flax."""

    torch_name: str
    tree: str  # PARAMS or ROUTING_BIAS
    path: tuple[str, ...]  # of the leaf in that nested dict
    index: tuple[int, ...]  # along the leaf's leading (layer, expert) axes
    transposed: bool

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """The PyTorch tensor, given the Flax leaf."""
        part = leaf[self.index]
        return part.T if self.transposed else part

    def write(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Put the PyTorch tensor into its place in the Flax leaf: the inverse of `to_torch`."""
        leaf[self.index] = tensor.T if self.transposed else tensor


def entries(config: ModelConfig) -> Iterator[Entry]:
    """The whole table for a model, in the order of PyTorch's state_dict."""

    def param(name: str, index: tuple[int, ...] = (), path: str | None = None, transposed: bool = False) -> Entry:
        return Entry(name, PARAMS, tuple((path or name).split(".")), index, transposed)

    yield param("token_embeddings.weight")
    yield param("position_embeddings.weight")
    for i in range(config.num_hidden_layers):
        layer = f"decoder_layers.{i}"
        for name in LINEARS:
            yield param(f"{layer}.{name}.weight", (i,), f"decoder_layers.{name}.weight", transposed=True)
        for kind, count in (("shared_experts", config.n_shared_experts), ("routed_experts", config.n_routed_experts)):
            for j in range(count):
                for name in EXPERT_LINEARS:
                    path = f"decoder_layers.mlp.{kind}.{name}.weight"
                    yield param(f"{layer}.mlp.{kind}.{j}.{name}.weight", (i, j), path, transposed=True)
        bias = ("decoder_layers", "mlp", "routing_bias")
        yield Entry(f"{layer}.mlp.routing_bias", ROUTING_BIAS, bias, (i,), False)
        for name in NORMS:
            yield param(f"{layer}.{name}.weight", (i,), f"decoder_layers.{name}.weight")
    if config.final_norm:
        yield param("final_norm.weight")
    yield param("lm_head.weight", transposed=True)
    yield param("lm_head.bias")


def leaf(tree: Pytree, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at a path."""
    for key in path:
        tree = tree[key]
    return tree


def torch_shape(entry: Entry, flax_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the PyTorch tensor, given that of the Flax leaf."""
    shape = flax_shape[len(entry.index) :]
    return shape[::-1] if entry.transposed else shape
