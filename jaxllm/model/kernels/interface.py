"""What the model asks of a device's kernels for the experts, as types. `jaxllm.model.kernels` chooses who provides it.

N tokens    P rows, sorted by expert    E experts of a layer, of S in an array (not key slots, as elsewhere)    L layers
D hidden    F expert hidden
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from jaxllm.model.dtypes import Array, Pytree

Weights = tuple[Array, Array, Array]
"""gate, up (S,D,F) and down (S,F,D) of S experts, which may be those of all layers."""


Adapter = tuple[Array, Array]
"""A and B of an expert's matrix, which add `(x @ A) @ B` to its product: (E,in,r) and (E,r,out)."""

Adapters = tuple[Adapter, Adapter, Adapter]
"""Of gate, up and down of the E experts of a layer."""

Gradients = Pytree
"""Arrays like what is trained of the experts: the weights, or their adapters, or nothing."""


class Saved(NamedTuple):
    """Where a layer saves the products with gate and up, side by side, for its backward pass."""

    rows: Array  # (L,P,2F)
    layer: Array | int  # () int, along the first axis


class ExpertRows(NamedTuple):
    """The operands of both passes: rows of tokens, and the experts that they go through."""

    x: Array  # (N,D), the tokens
    tokens: Array | None  # (P,) int32, the token of each row; None: row i is token i
    row_weights: Array  # (P,1), in float32 or wider, the gate of each row
    group_sizes: Array  # (E,) int32, rows of each expert, in the order of the experts
    weights: Weights  # as `prepared` returns them
    offset: Array | int  # () int, the first of the E experts in the weights
    adapters: Adapters | None = None  # of the E experts; None: they have none


@dataclass(frozen=True)
class ExpertKernels:
    """Both passes over SwiGLU networks; static and hashable. The backward pass is explicit: see `expert_ffn`."""

    ffn: Callable[[ExpertRows, Saved | None], tuple[Array, Array | None]]
    """`swiglu(x @ gate[e], x @ up[e], row_weights) @ down[e]` of each row, (P,D), e = offset + its group; and
    `saved.rows` with the products with gate and up written side by side into this layer's part, in place."""
    ffn_gradients: Callable[[ExpertRows, Array, Saved | None, Gradients], tuple[Array, Array, Gradients]]
    """From the gradient of each token's output, (N,D), those of the rows, (P,D), of `row_weights`, (P,1), and of what
    is trained of the E experts, written in place: their weights, into arrays like all S masters; or their adapters,
    into arrays like these; or nothing, if the experts are frozen. Without `Saved` it computes the products again."""
    padding: Callable[[int], int]
    """How many rows of padding must follow this many rows."""
    prepared: Callable[[Array, jnp.dtype], Array]
    """Weights as both passes read them in a compute dtype."""
    new_saved: Callable[[int, int, int, jnp.dtype], Array]
    """An array (L, rows and their padding, features) for `Saved`."""
    new_gradient: Callable[[Array], Array]
    """An array like the weights, into which every layer's `ffn_gradients` is to be written."""
    recomputes: bool = False
    """Whether the forward pass saves nothing, and the backward pass computes the products again."""
