"""What lies on which device: the axes of the mesh, and one table of parameters.

    data     every device along it holds a copy of everything, and its own rows of the batch
    fsdp     parameters and optimizer state are cut along it; a layer's weights are gathered while it runs, and their
             gradients summed and cut again (ZeRO stage 3, arXiv:1910.02054)
    expert   the routed experts are spread over it, and every device's tokens reach all of them

The rows of a batch are spread over all axes. A step is written for one device's part of everything (`gradients`), with
the collectives in it by name; it runs under `shard_map` on a mesh, under `pmap` with `data` alone, or on one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.config import AXES, ModelConfig

Array = jax.Array
Pytree = Any

# The axes of each parameter, by the end of its path; those of `decoder_layers` have the layer's in front.
PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "token_embeddings.weight": ("vocab", "hidden"),
    "position_embeddings.weight": ("position", "hidden"),
    "lm_head.weight": ("hidden", "vocab"),
    "lm_head.bias": ("vocab",),
    "final_norm.weight": ("norm",),
    "input_norm.weight": ("norm",),
    "post_attn_norm.weight": ("norm",),
    "self_attn.kv_proj_d.weight": ("hidden", "latent"),
    "self_attn.q_proj_d.weight": ("hidden", "latent"),
    "self_attn.k_proj_u.weight": ("latent", "heads"),
    "self_attn.v_proj_u.weight": ("latent", "heads"),
    "self_attn.q_proj_u.weight": ("latent", "heads"),
    "self_attn.rope_q.weight": ("latent", "heads"),
    "self_attn.rope_k.weight": ("hidden", "rotary"),
    "self_attn.o_proj.weight": ("context", "hidden"),
    "mlp.router.weight": ("hidden", "score"),
    "mlp.routing_bias": ("score",),
    "shared_experts.gate_proj.weight": ("shared_expert", "hidden", "expert_hidden"),
    "shared_experts.up_proj.weight": ("shared_expert", "hidden", "expert_hidden"),
    "shared_experts.down_proj.weight": ("shared_expert", "expert_hidden", "hidden"),
    "routed_experts.gate_proj.weight": ("expert", "hidden", "expert_hidden"),
    "routed_experts.up_proj.weight": ("expert", "hidden", "expert_hidden"),
    "routed_experts.down_proj.weight": ("expert", "expert_hidden", "hidden"),
}

# Along which axis of the mesh a parameter's axis is cut; the others are whole on every device.
MESH_AXIS = {"hidden": "fsdp", "heads": "fsdp", "expert": "expert"}


def _regather(primitive, *_, **__) -> bool:
    """What the backward pass may keep: neither gathered weights nor casts of them (of activations a cast is cheap)."""
    return primitive.name not in ("all_gather", "convert_element_type")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many devices stand along each axis, and the mesh they form."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    mesh: Mesh | None = None
    """None: one device, or `pmap` over `data`."""

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.expert

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that have more than one device."""
        return tuple(axis for axis in AXES if getattr(self, axis) > 1)

    def number(self) -> Array | int:
        """Which device this is, 0 to `devices - 1`; in a step alone."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def total(self, tree: Pytree) -> Pytree:
        """The sum of all devices' values; in a step alone, and not where a gradient passes through."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def gather(self, weights: Pytree) -> Pytree:
        """Parts of one layer's weights, or of those beside the layers, as the whole that `fsdp` holds.

        In a step alone. Its gradient sums over `fsdp` and cuts.
        """
        if self.fsdp == 1:
            return weights

        def whole(path, part: Array) -> Array:
            axes = parameter_axes(path)[-part.ndim :]  # of one layer
            for dimension, axis in enumerate(axes):
                if MESH_AXIS.get(axis) == "fsdp":
                    return jax.lax.all_gather(part, "fsdp", axis=dimension, tiled=True)
            return part

        return jax.tree_util.tree_map_with_path(whole, weights)

    def sum_gradients(self, gradients: Pytree) -> Pytree:
        """Each device's share of the gradients, summed over the axes along which a parameter is not cut."""

        def summed(path, gradient: Array) -> Array:
            cut = {MESH_AXIS.get(axis) for axis in parameter_axes(path)}
            whole = tuple(axis for axis in self.axes if axis not in cut)
            return jax.lax.psum(gradient, whole) if whole else gradient

        return jax.tree_util.tree_map_with_path(summed, gradients)

    def on_each_device(self, function: Callable, in_specs: Pytree, out_specs: Pytree) -> Callable:
        """What is written for one device's part, as a function of the whole; without a mesh it is that already."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def checkpoint(self, body: Callable, remat: bool) -> Callable:
        """A layer's function, of which the backward pass computes again: all with `remat`, else the gathering."""
        if remat:
            return jax.checkpoint(body)
        if self.fsdp > 1:
            return jax.checkpoint(body, policy=_regather)
        return body

    def specs(self, tree: Pytree) -> Pytree:
        """The PartitionSpec of each leaf of parameters, of a TrainState, or of whatever is made of them.

        What does not divide evenly is not cut there: the model's own experts, before room was made for more, are cut
        along the first other axis that does.
        """

        def spec(path, leaf) -> PartitionSpec:
            if not is_parameter(path):
                return PartitionSpec()
            wanted = [MESH_AXIS.get(axis) for axis in parameter_axes(path)]
            cut = [
                axis if axis in self.axes and size % getattr(self, axis) == 0 else None
                for axis, size in zip(wanted, leaf.shape, strict=True)
            ]
            if "expert" in wanted and "expert" in self.axes and "expert" not in cut:
                free = (i for i, size in enumerate(leaf.shape) if cut[i] is None and size % self.expert == 0)
                if (dimension := next(free, None)) is not None:
                    cut[dimension] = "expert"
            return PartitionSpec(*cut)

        return jax.tree_util.tree_map_with_path(spec, tree)

    def batch_spec(self, dimension: int) -> PartitionSpec:
        """Rows of a batch, which are an array's axis number `dimension`."""
        return PartitionSpec(*[None] * dimension, self.axes or None)

    def shardings(self, specs: Pytree) -> Pytree:
        """Where the mesh puts what has these specs."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )


ONE_DEVICE = Layout()


def make_mesh(devices: Sequence, **sizes: int) -> Layout:
    """A layout on these devices; the axes that are not named have one."""
    layout = Layout(**sizes)
    shape = tuple(getattr(layout, axis) for axis in AXES)
    return dataclasses.replace(layout, mesh=Mesh(np.asarray(devices).reshape(shape), AXES))


def _names(path) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def is_parameter(path) -> bool:
    """Whether a leaf of a TrainState is a parameter, a moment of one, or the routing bias."""
    return bool(_names(path))


def parameter_axes(path) -> tuple[str, ...]:
    """The axes of the parameter (or its moment, or its gradient) at a path of nested dicts.

    Raises:
        KeyError: the table does not have it, or has it twice.
    """
    name = ".".join(map(str, _names(path)))
    found = [axes for end, axes in PARAMETER_AXES.items() if f".{name}".endswith(f".{end}")]
    if len(found) != 1:
        raise KeyError(f"{name}: PARAMETER_AXES has {len(found)} entries for it, it must have one")
    return ("layer", *found[0]) if "decoder_layers" in _names(path) else found[0]


def stored_experts(model: ModelConfig, layout: Layout) -> int:
    """Routed experts that the state has room for: as many as divide evenly; those behind the model's own are zeros."""
    return math.ceil(model.n_routed_experts / layout.expert) * layout.expert


def pad_experts(tree: Pytree, model: ModelConfig, layout: Layout) -> Pytree:
    """Make room for `stored_experts`. Their gradient is zero, and AdamW leaves zeros as they are."""
    return _resize_experts(tree, stored_experts(model, layout))


def unpad_experts(tree: Pytree, model: ModelConfig) -> Pytree:
    """The model's own experts alone: the inverse of `pad_experts`."""
    return _resize_experts(tree, model.n_routed_experts)


def _resize_experts(tree: Pytree, experts: int) -> Pytree:
    def resized(path, leaf: Array) -> Array:
        axes = parameter_axes(path) if is_parameter(path) else ()
        if "expert" not in axes:
            return leaf
        dimension = axes.index("expert")
        more = experts - leaf.shape[dimension]
        if more <= 0:
            return jax.lax.slice_in_dim(leaf, 0, experts, axis=dimension)
        return jnp.pad(leaf, [(0, more if d == dimension else 0) for d in range(leaf.ndim)])

    return jax.tree_util.tree_map_with_path(resized, tree)
