"""The devices that share a step, as the model's code sees them: axes, and the collectives inside a step.

    data     every device along it holds a copy of everything, and local rows of the batch
    fsdp     parameters and optimizer state are cut along it; a layer's weights are gathered while it runs, and their
             gradients summed and cut again (ZeRO stage 3, arXiv:1910.02054)
    expert   the routed experts are spread over it, and every device's tokens reach all of them

The rows of a batch are spread over all axes. A step is written for one device's part of everything (`gradients`), with
the collectives in it by name; it runs under `shard_map` on a mesh, under `pmap` with `data` alone, or on one device.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxllm.config import AXES
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.kernels.matmul import SAVED

MESH_AXIS = {"hidden": "fsdp", "heads": "fsdp", "expert": "expert"}
"""Along which axis of the mesh a parameter's axis is cut. A parameter's other axes are whole on every device."""


_GPU_KERNELS = ("pallas_call", "dot_product_attention_fwd_wrapper")
"""JAX's primitives of the grouped products and of cuDNN's attention; a program for another device has none of them."""

_ROUTING = ("sort", "top_k", "scatter")
"""Primitives that route tokens to experts; they return a few numbers per token."""


def _is_of_gpu_kernel(primitive, *_, **__) -> bool:
    return primitive.name in _GPU_KERNELS


def _is_saved(primitive, *_, **parameters) -> bool:
    marked = primitive.name == "name" and parameters["name"] == SAVED
    return marked or primitive.name in (*_GPU_KERNELS, *_ROUTING)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many devices there are along each axis, and the mesh they form."""

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

    def device_index(self) -> Array | int:
        """The index of this device, 0 to `devices - 1`; only inside a step."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def psum(self, tree: Pytree) -> Pytree:
        """The sum over all devices; only inside a step, and not where a gradient passes through."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def gather(self, weights: Pytree, facts: Pytree) -> Pytree:
        """All-gather one layer's weights, or those outside the layers, along `fsdp`. Its transpose is a reduce-scatter.

        Only inside a step.
        """
        if self.fsdp == 1:
            return weights

        def whole(part: Array, axes: tuple[str, ...]) -> Array:
            for dimension, axis in enumerate(axes[-part.ndim :]):  # of one layer
                if MESH_AXIS.get(axis) == "fsdp":
                    return jax.lax.all_gather(part, "fsdp", axis=dimension, tiled=True)
            return part

        return jax.tree.map(lambda part, known: whole(part, known.axes), weights, facts)

    def sum_gradients(self, gradients: Pytree, facts: Pytree) -> Pytree:
        """Each device's share of the gradients, summed over the axes along which a parameter is not cut."""

        def summed(gradient: Array, axes: tuple[str, ...]) -> Array:
            cut = {MESH_AXIS.get(axis) for axis in axes}
            whole = tuple(axis for axis in self.axes if axis not in cut)
            return jax.lax.psum(gradient, whole) if whole else gradient

        return jax.tree.map(lambda gradient, known: summed(gradient, known.axes), gradients, facts)

    def shard_map(self, function: Callable, in_specs: Pytree, out_specs: Pytree) -> Callable:
        """A function of one device's part, as a function of the whole; without a mesh it is that already."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def parameter_spec(self, axes: tuple[str, ...]) -> PartitionSpec:
        """Where a parameter with these axes is cut."""
        return PartitionSpec(*(axis if axis in self.axes else None for axis in map(MESH_AXIS.get, axes)))

    def batch_spec(self, dimension: int) -> PartitionSpec:
        """Rows of a batch, along an array's axis number `dimension`."""
        return PartitionSpec(*[None] * dimension, self.axes or None)


ONE_DEVICE = Layout()


def checkpoint(layer: Callable, remat: bool) -> Callable:
    """A layer's function, with what its backward pass saves.

    Without `remat` it saves the results of products. It recomputes elementwise work, which costs no more than writing
    and reading the result, and gathers weights again along `fsdp`: saved, they would be the whole model. With `remat`
    it saves only the results of a GPU's own kernels, which cost the most to run again.
    """
    # the layers run in a scan, across whose two loops XLA merges nothing
    return jax.checkpoint(layer, prevent_cse=False, policy=_is_of_gpu_kernel if remat else _is_saved)
