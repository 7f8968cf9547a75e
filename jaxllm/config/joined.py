"""Which linear maps the files of a family join to one matrix, by the names of this project's modules.

The converter reads it (`convert.mapping`), and so do adapters, which belong to a matrix of a file.
"""

from typing import NamedTuple

from jaxllm.config.families import names_of
from jaxllm.config.model import ModelConfig


class Joined(NamedTuple):
    """Groups of linear maps of a layer, each one matrix in a file; a map that is in no group is a matrix by itself."""

    queries: tuple[str, ...] = ()
    latent: tuple[str, ...] = ()
    expanded: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    """Of a routed expert, in transformers' classes: their files have them apart."""
    shared_experts: bool = False
    """Whether all shared experts of a layer are one network, side by side."""


def joined_linears(config: ModelConfig) -> Joined:
    """Of the family of a model. Raises a UserError if no PyTorch model has all options of this config."""
    if names_of(config) == "customllm":
        return Joined()
    return Joined(
        queries=("q_proj_u", "rope_q"),
        latent=("kv_proj_d", "rope_k"),
        expanded=("k_proj_u", "v_proj_u"),
        experts=("gate_proj", "up_proj"),
        shared_experts=True,
    )
