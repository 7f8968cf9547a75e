"""The one table of names: which PyTorch tensor is which slices of which Flax arrays. Both directions read it.

Flax stacks the layers, and within them the experts, along leading axes, and keeps a linear weight as (in, out);
PyTorch has a tensor for each of them, as (out, in). Files of the DeepSeek family join what Flax keeps apart:

    q_proj, q_b_proj        head by head n rows of q_proj_u, then r rows of rope_q
    kv_a_proj_with_mqa      R rows of kv_proj_d, then r rows of rope_k
    kv_b_proj               head by head n rows of k_proj_u, then v rows of v_proj_u
    shared_experts          one network of all shared experts, side by side

Where a file rotates the pairs (2i, 2i+1), its rotary rows are permuted to Flax's pairs (i, i + r/2). Only products of
two rotated vectors are used, so that the model is the same.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.config.families import names_of
from jaxllm.config.joined import joined_linears

Pytree = Any

PARAMS = "params"
ROUTING_BIAS = "routing_bias"

NORMS = ("input_norm", "post_attn_norm")
EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")

_ALL = slice(None)

BLOCK = 128
"""Rows and columns that are transposed at a time."""


class Part(NamedTuple):
    """A slice of one Flax leaf, and its place in a PyTorch tensor."""

    tree: str  # PARAMS or ROUTING_BIAS
    path: tuple[str, ...]  # of the leaf in that nested dict
    index: tuple[int, ...] = ()  # along the leaf's leading (layer, expert) axes
    where: slice | np.ndarray = _ALL  # along the entry's axis of the PyTorch tensor


Box = tuple[range, ...]
"""A part of an array: a range of each axis."""


class Held(NamedTuple):
    """The values of a PyTorch tensor that a box of a Flax leaf holds."""

    index: tuple[int, ...]  # in the box, along its leading axes
    axes: tuple[range | np.ndarray, ...]  # of the PyTorch tensor: which of each axis

    @property
    def span(self) -> Box:
        """The box of the PyTorch tensor from the first of them to the last."""
        return tuple(
            along if isinstance(along, range) else range(int(along.min()), int(along.max()) + 1) for along in self.axes
        )

    def within(self, box: Box) -> tuple[slice | np.ndarray, ...]:
        """The index of these values in a box of the PyTorch tensor."""
        return tuple(
            slice(along.start - read.start, along.stop - read.start) if isinstance(along, range) else along - read.start
            for along, read in zip(self.axes, box, strict=True)
        )


class Entry(NamedTuple):
    """One PyTorch tensor and the places of its values in Flax."""

    torch_name: str
    parts: tuple[Part, ...]
    transposed: bool = False
    axis: int = 0
    """Along which the parts lie in the PyTorch tensor."""
    optional: bool = False
    """Whether a file may lack it; it is zero then."""
    float32: bool = False
    """Whether files have it in float32 whatever their dtype is."""

    @property
    def is_parameter(self) -> bool:
        return self.parts[0].tree == PARAMS

    def lies_in(self, trees: dict[str, Pytree]) -> bool:
        """Whether the trees have its leaves: moments of an optimizer may not."""
        return all(part.tree in trees and has_leaf(trees[part.tree], part.path) for part in self.parts)

    def shape(self, trees: dict[str, Pytree]) -> tuple[int, ...]:
        """Shape of the PyTorch tensor, given the Flax trees, of arrays or shapes."""
        shapes = []
        for part in self.parts:
            shape = leaf(trees[part.tree], part.path).shape[len(part.index) :]
            shapes.append(shape[::-1] if self.transposed else shape)
        joined = list(shapes[0])
        joined[self.axis] = sum(shape[self.axis] for shape in shapes)
        return tuple(joined)

    def to_torch(self, trees: dict[str, Pytree]) -> np.ndarray:
        """The PyTorch tensor, given the Flax trees: a view where it is a single part."""
        pieces = [self._piece(trees, part) for part in self.parts]
        if len(pieces) == 1 and self.parts[0].where is _ALL:
            return pieces[0]
        tensor = np.empty(self.shape(trees), pieces[0].dtype)
        for part, piece in zip(self.parts, pieces, strict=True):
            tensor[(_ALL,) * self.axis + (part.where,)] = piece
        return tensor

    def write(self, trees: dict[str, Pytree], tensor: np.ndarray) -> None:
        """Put the PyTorch tensor into its places in the Flax trees: the inverse of `to_torch`."""
        for part in self.parts:
            piece = tensor[(_ALL,) * self.axis + (part.where,)]
            leaf(trees[part.tree], part.path)[part.index] = piece.T if self.transposed else piece

    def held_by(self, part: Part, box: Box) -> Held | None:
        """Where the values of a part that lie in a box of its leaf are; None: there are none."""
        lead = len(part.index)
        if not all(i in held for i, held in zip(part.index, box, strict=False)):
            return None
        axes: list[Any] = list(reversed(box[lead:]) if self.transposed else box[lead:])
        if isinstance(part.where, slice):
            start = part.where.start or 0
            axes[self.axis] = range(start + axes[self.axis].start, start + axes[self.axis].stop)
        else:
            axes[self.axis] = part.where[slice(axes[self.axis].start, axes[self.axis].stop)]
        return Held(tuple(i - held.start for i, held in zip(part.index, box, strict=False)), tuple(axes))

    def _piece(self, trees: dict[str, Pytree], part: Part) -> np.ndarray:
        piece = np.asarray(leaf(trees[part.tree], part.path))[part.index]
        return piece.T if self.transposed else piece


def entries(config: ModelConfig, interleaved: bool = True) -> Iterator[Entry]:
    """The whole table for a model, in the order of PyTorch's state_dict.

    Args:
        interleaved: whether the files of the DeepSeek family rotate the pairs (2i, 2i+1).

    Raises:
        UserError: no PyTorch model has all options of this config.
    """
    names: dict[str, Callable[[ModelConfig, bool], Iterator[Entry]]] = {
        "customllm": _customllm_entries,
        "deepseek": _deepseek_entries,
    }
    return names[names_of(config)](config, interleaved)


def _param(name: str, path: str, index: tuple[int, ...] = (), transposed: bool = False) -> Entry:
    return Entry(name, (Part(PARAMS, tuple(path.split(".")), index),), transposed)


def _customllm_entries(config: ModelConfig, _: bool) -> Iterator[Entry]:
    linears = ("kv_proj_d", "q_proj_d", "k_proj_u", "v_proj_u", "q_proj_u", "rope_k", "rope_q", "o_proj")
    yield _param("token_embeddings.weight", "token_embeddings.weight")
    yield _param("position_embeddings.weight", "position_embeddings.weight")
    for i in range(config.num_hidden_layers):
        for name in (*(f"self_attn.{linear}" for linear in linears), "mlp.router"):
            yield _param(f"decoder_layers.{i}.{name}.weight", f"decoder_layers.{name}.weight", (i,), True)
        for kind, count in (("shared_experts", config.n_shared_experts), ("routed_experts", config.n_routed_experts)):
            for j in range(count):
                for name in EXPERT_LINEARS:
                    path = f"decoder_layers.mlp.{kind}.{name}.weight"
                    yield _param(f"decoder_layers.{i}.mlp.{kind}.{j}.{name}.weight", path, (i, j), True)
        bias = Part(ROUTING_BIAS, ("decoder_layers", "mlp", "routing_bias"), (i,))
        yield Entry(f"decoder_layers.{i}.mlp.routing_bias", (bias,), optional=True)
        for name in NORMS:
            yield _param(f"decoder_layers.{i}.{name}.weight", f"decoder_layers.{name}.weight", (i,))
    if config.final_norm:
        yield _param("final_norm.weight", "final_norm.weight")
    yield _param("lm_head.weight", "lm_head.weight", transposed=True)
    yield _param("lm_head.bias", "lm_head.bias")


def _deepseek_entries(config: ModelConfig, interleaved: bool) -> Iterator[Entry]:
    yield _param("model.embed_tokens.weight", "token_embeddings.weight")
    rows = _JoinedRows(config, interleaved)
    for i in range(config.num_hidden_layers):
        dense = i < config.dense_layers
        stack, index = ("dense_layers", i) if dense else ("decoder_layers", i - config.dense_layers)
        yield from _deepseek_attention(config, rows, f"model.layers.{i}.self_attn", f"{stack}.self_attn", (index,))
        feed_forward = _deepseek_dense if dense else _deepseek_moe
        yield from feed_forward(config, f"model.layers.{i}.mlp", f"{stack}.mlp", (index,))
        yield _param(f"model.layers.{i}.input_layernorm.weight", f"{stack}.input_norm.weight", (index,))
        yield _param(f"model.layers.{i}.post_attention_layernorm.weight", f"{stack}.post_attn_norm.weight", (index,))
    yield _param("model.norm.weight", "final_norm.weight")
    if not config.tie_word_embeddings:
        yield _param("lm_head.weight", "lm_head.weight", transposed=True)


class _JoinedRows:
    """Which rows of a joined tensor belong to which Flax leaf, as (leaf, rows) pairs."""

    def __init__(self, config: ModelConfig, interleaved: bool):
        H, R = config.num_attention_heads, config.kv_latent_size
        n, r, v = config.nope_head_dim, config.rope_head_dim, config.value_head_dim
        rotary = np.arange(r)  # row of the file for each of Flax's
        if interleaved:
            rotary = np.concatenate([rotary[::2], rotary[1::2]])

        def of_heads(width: int, within: np.ndarray) -> np.ndarray:
            return (np.arange(H)[:, None] * width + within).reshape(-1)

        joined = joined_linears(config)
        rows = of_heads(n + r, np.arange(n)), of_heads(n + r, n + rotary)
        self.queries = tuple(zip(joined.queries, rows, strict=True))
        self.latent = tuple(zip(joined.latent, (np.arange(R), R + rotary), strict=True))
        rows = of_heads(n + v, np.arange(n)), of_heads(n + v, n + np.arange(v))
        self.expanded = tuple(zip(joined.expanded, rows, strict=True))


def _deepseek_attention(
    config: ModelConfig, rows: _JoinedRows, name: str, path: str, index: tuple[int]
) -> Iterator[Entry]:
    def joined(torch_name: str, parts: tuple[tuple[str, np.ndarray], ...], what: str = "weight") -> Entry:
        places = (Part(PARAMS, (*path.split("."), leaf, what), index, where) for leaf, where in parts)
        return Entry(f"{name}.{torch_name}.{what}", tuple(places), transposed=what == "weight")

    if config.q_latent_size:
        yield _param(f"{name}.q_a_proj.weight", f"{path}.q_proj_d.weight", index, True)
        if config.attention_bias:
            yield _param(f"{name}.q_a_proj.bias", f"{path}.q_proj_d.bias", index)
        yield _param(f"{name}.q_a_layernorm.weight", f"{path}.q_norm.weight", index)
    yield joined("q_b_proj" if config.q_latent_size else "q_proj", rows.queries)
    yield joined("kv_a_proj_with_mqa", rows.latent)
    if config.attention_bias:
        yield joined("kv_a_proj_with_mqa", rows.latent, "bias")
    yield _param(f"{name}.kv_a_layernorm.weight", f"{path}.kv_norm.weight", index)
    yield joined("kv_b_proj", rows.expanded)
    yield _param(f"{name}.o_proj.weight", f"{path}.o_proj.weight", index, True)
    if config.attention_bias:
        yield _param(f"{name}.o_proj.bias", f"{path}.o_proj.bias", index)


def _deepseek_dense(config: ModelConfig, name: str, path: str, index: tuple[int]) -> Iterator[Entry]:
    for linear in EXPERT_LINEARS:
        yield _param(f"{name}.{linear}.weight", f"{path}.{linear}.weight", index, True)


def _deepseek_moe(config: ModelConfig, name: str, path: str, index: tuple[int]) -> Iterator[Entry]:
    yield _param(f"{name}.gate.weight", f"{path}.router.weight", index, True)
    if config.router.has_bias:
        bias = Part(ROUTING_BIAS, (*path.split("."), "routing_bias"), index)
        yield Entry(f"{name}.gate.e_score_correction_bias", (bias,), float32=True)
    for j in range(config.n_routed_experts):
        for linear in EXPERT_LINEARS:
            expert = f"{path}.routed_experts.{linear}.weight"
            yield _param(f"{name}.experts.{j}.{linear}.weight", expert, (*index, j), True)
    M = config.moe_intermediate_size
    for linear in EXPERT_LINEARS:
        shared = (*path.split("."), "shared_experts", linear, "weight")
        parts = (Part(PARAMS, shared, (*index, s), slice(s * M, (s + 1) * M)) for s in range(config.n_shared_experts))
        axis = 1 if linear == "down_proj" else 0
        yield Entry(f"{name}.shared_experts.{linear}.weight", tuple(parts), transposed=True, axis=axis)


def has_leaf(tree: Pytree, path: tuple[str, ...]) -> bool:
    """Whether a nested dict has a leaf at a path."""
    for key in path:
        if key not in tree:
            return False
        tree = tree[key]
    return True


def leaf(tree: Pytree, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at a path."""
    for key in path:
        tree = tree[key]
    return tree


def copy_into(target: np.ndarray, values: np.ndarray) -> None:
    """`target[...] = values`, which casts. A transposed matrix is copied in blocks that a processor's cache holds: by
    itself, NumPy takes six times as long."""
    if target.ndim != 2 or values.strides[0] >= values.strides[1]:
        target[...] = values
        return
    for row in range(0, len(target), BLOCK):
        for column in range(0, target.shape[1], BLOCK):
            at = slice(row, row + BLOCK), slice(column, column + BLOCK)
            target[at] = values[at].T.astype(target.dtype).T  # contiguous in the target's dtype first
