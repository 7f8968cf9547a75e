"""The mesh that a config requests, and the shardings of arrays with a PartitionSpec."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.config import AXES
from jaxllm.config.groups import MeshConfig
from jaxllm.errors import UserError
from jaxllm.model.dtypes import Pytree
from jaxllm.model.layout import Layout


def make_mesh(devices: Sequence[Any], **sizes: int) -> Layout:
    """A layout on these devices; axes that are not named have size 1."""
    layout = Layout(**sizes)  # pyright: ignore[reportArgumentType]
    shape = tuple(getattr(layout, axis) for axis in AXES)
    return dataclasses.replace(layout, mesh=Mesh(np.asarray(devices).reshape(shape), AXES))


def choose_mesh(mesh: MeshConfig) -> Layout:
    """The mesh that a config requests, on the available devices.

    Raises a UserError if there are too few devices, or if several processes do not use a mesh of all devices.
    """
    devices, wanted, axes = jax.devices(), mesh.devices, mesh.axes
    if jax.process_count() > 1:
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        if wanted != len(devices):
            raise UserError(
                f"mesh is {axes!r}: {jax.process_count()} processes run one step on a mesh of all their "
                f"{len(devices)} devices, such as --mesh data={len(devices)}"
            )
    if wanted > len(devices):
        raise UserError(
            f"mesh is {axes!r}: it needs {wanted} devices, and {len(devices)} "
            f"{'is' if len(devices) == 1 else 'are'} available; pass a smaller --mesh "
            f"(to simulate more on a CPU: JAX_NUM_CPU_DEVICES={wanted})"
        )
    return make_mesh(devices[:wanted], **mesh.sizes)


def shardings(layout: Layout, specs: Pytree) -> Pytree:
    """The shardings of arrays with these specs on the mesh of a layout."""
    mesh = layout.mesh
    if mesh is None:
        raise ValueError("a layout without a mesh has no shardings")
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
