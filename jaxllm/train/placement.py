"""Where a run's state is kept and what executes its step: one device, a mesh of devices, or `pmap`.

Outside a step a state has one form, that of one device: it is saved, restored and exported in this form, whatever it
was trained on. `shard` brings it into the form that the placement's programs take, `unshard` back.

    OneDevice   the state as it is
    OnMesh      the same arrays, cut along the axes of the mesh
    Pmap        each array with a leading axis, one copy a device
"""

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxllm.config import AXES
from jaxllm.config.groups import MeshConfig
from jaxllm.errors import UserError
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.train.computation import Computation
from jaxllm.train.sharding import choose_mesh, shardings
from jaxllm.train.state import TrainState, abstract_state
from jaxllm.train.step import StepMetrics


class Programs(NamedTuple):
    """What a run executes, compiled."""

    step: Callable[[TrainState, np.ndarray], tuple[TrainState, StepMetrics]]  # labels (A,B,T); donates the state
    evaluate: Callable[[TrainState, np.ndarray], tuple[Array, Array]]  # labels (B,T) -> summed cross-entropy, targets
    seconds: float  # to trace both and to compile them, or read them from the cache


class Placement(ABC):
    """Keeps a state and runs its step. B are a batch's rows of this process."""

    layout: Layout

    @abstractmethod
    def describe(self) -> str:
        """A description of the placement, for a line at start-up."""

    @abstractmethod
    def compile(self, computation: Computation) -> tuple[Callable, Callable]:
        """`Programs.step` and `Programs.evaluate`."""

    def state_shardings(self, computation: Computation) -> TrainState | None:
        """Where a checkpoint restores each array of the state; None: on the first device."""
        return None

    def init(self, computation: Computation) -> TrainState:
        """A new run's state, in the form that the programs take."""
        return jax.jit(computation.init_state, out_shardings=self.state_shardings(computation))()

    def shard(self, state: TrainState) -> TrainState:
        """From the form of one device to the form that the programs take."""
        return state

    def unshard(self, state: TrainState) -> TrainState:
        """Back to the form of one device; on a mesh the arrays stay spread over its devices."""
        return state


def choose_placement(mesh: MeshConfig, batch_size: int) -> Placement:
    """The placement that a config asks for, on the devices here.

    Raises a UserError if there are too few devices, or if they do not divide the batch.
    """
    if mesh.parallel == "pmap":
        return Pmap(batch_size)
    if mesh.sizes or jax.process_count() > 1:
        return OnMesh(choose_mesh(mesh))
    return OneDevice()


def compile_programs(placement: Placement, computation: Computation) -> Programs:
    """Trace and compile what a run executes."""
    start = time.perf_counter()
    return Programs(*placement.compile(computation), time.perf_counter() - start)


class OneDevice(Placement):
    """The first device."""

    layout = ONE_DEVICE

    def describe(self) -> str:
        here = len(jax.devices())
        return "one device" + (f" of {here}: pass --mesh or --parallel pmap to use more" if here > 1 else "")

    def compile(self, computation: Computation) -> tuple[Callable, Callable]:
        evaluate = _compile_evaluation(computation, ONE_DEVICE)
        step = lower_step(computation, ONE_DEVICE).compile()
        return step, lambda state, labels: evaluate(state.params, state.routing_bias, labels)


class OnMesh(Placement):
    """A mesh of devices, perhaps of several processes. Each part of a state is made and restored where it is kept."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def describe(self) -> str:
        return "mesh " + " x ".join(f"{axis}={getattr(self.layout, axis)}" for axis in AXES)

    def state_shardings(self, computation: Computation) -> TrainState:
        return shardings(self.layout, computation.specs(self.layout))

    def compile(self, computation: Computation) -> tuple[Callable, Callable]:
        layout, state = self.layout, self.state_shardings(computation)
        rows = shardings(layout, layout.batch_spec(0))
        evaluate = _compile_evaluation(computation, layout, in_shardings=(state.params, state.routing_bias, rows))
        step = lower_step(computation, layout).compile()
        if jax.process_count() == 1:
            return step, lambda state, labels: evaluate(state.params, state.routing_bias, labels)
        batch_size = computation.shape[1]
        first, _ = local_rows(batch_size)

        def global_batch(local: np.ndarray, axis: int, start: int) -> Array:
            """A batch over all processes, of which this one has the rows from `start` on."""
            shape = (*local.shape[:axis], batch_size, *local.shape[axis + 1 :])

            def part(index: Any) -> np.ndarray:  # a slice for each axis
                rows = index[axis]
                return local[(*index[:axis], slice(rows.start - start, rows.stop - start))]

            return jax.make_array_from_callback(shape, shardings(layout, layout.batch_spec(axis)), part)

        return (
            lambda state, labels: step(state, global_batch(labels, 1, first)),
            lambda state, labels: evaluate(state.params, state.routing_bias, global_batch(labels, 0, 0)),
        )


def _compile_evaluation(computation: Computation, layout: Layout, **options: Any) -> Callable:
    state = abstract_state(computation.model, computation.optim)
    evaluate = jax.jit(functools.partial(computation.eval_step, layout=layout), **options)
    return evaluate.lower(state.params, state.routing_bias, _micro_batch(computation)).compile()


def _micro_batch(computation: Computation) -> jax.ShapeDtypeStruct:  # (B,T)
    return jax.ShapeDtypeStruct(computation.shape[1:], computation.labels.dtype)


class Pmap(Placement):
    """All devices of this process, each with a copy of the model and local rows of the batch."""

    def __init__(self, batch_size: int):
        devices = len(jax.devices())
        if jax.process_count() > 1:
            raise UserError("parallel is 'pmap': that is for the devices of one process, pass --mesh instead")
        if batch_size % devices:
            raise UserError(
                f"batch_size is {batch_size}: under --parallel pmap it must be a multiple of the "
                f"{devices} devices here, which share its rows"
            )
        self.layout = Layout(data=devices)

    def describe(self) -> str:
        return f"pmap over {self.layout.devices} devices, each with a copy of the model"

    def init(self, computation: Computation) -> TrainState:
        return self.shard(OneDevice().init(computation))

    def shard(self, state: TrainState) -> TrainState:
        return jax.pmap(lambda _, state: state, in_axes=(0, None))(np.arange(self.layout.devices), state)

    def unshard(self, state: TrainState) -> TrainState:
        return _first_copy(state)

    def compile(self, computation: Computation) -> tuple[Callable, Callable]:
        layout, n = self.layout, self.layout.devices

        def by_device(labels: np.ndarray, axis: int) -> np.ndarray:
            """A batch with the devices' axis in front."""
            parts = labels.reshape(*labels.shape[:axis], n, -1, *labels.shape[axis + 1 :])
            return np.moveaxis(parts, axis, 0)

        state = jax.eval_shape(jax.vmap(lambda _: computation.init_state()), np.arange(n))
        step = jax.pmap(functools.partial(computation.train_step, layout=layout), "data", donate_argnums=0)
        step = step.lower(state, jax.eval_shape(lambda x: by_device(x, 1), computation.labels)).compile()
        evaluate = jax.pmap(functools.partial(computation.eval_step, layout=layout), "data")
        labels = jax.eval_shape(lambda x: by_device(x, 0), _micro_batch(computation))
        evaluate = evaluate.lower(state.params, state.routing_bias, labels).compile()

        def run_step(state: TrainState, labels: np.ndarray) -> tuple[TrainState, StepMetrics]:
            state, metrics = step(state, by_device(labels, 1))
            return state, _first_copy(metrics)

        def run_evaluate(state: TrainState, labels: np.ndarray) -> tuple[Array, Array]:
            return _first_copy(evaluate(state.params, state.routing_bias, by_device(labels, 0)))

        return run_step, run_evaluate


def _first_copy(tree: Pytree) -> Pytree:
    """What the first device holds of arrays with an axis of devices in front; the others do nothing."""
    return jax.tree.map(lambda copies: copies.addressable_data(0)[0], tree)


def on_one_device(layout: Layout, tree: Pytree) -> Pytree:
    """Arrays in the form of one device, whole on the first device of this process. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_put(tree, jax.devices()[0])
    whole = jax.jit(lambda tree: tree, out_shardings=shardings(layout, PartitionSpec()))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def local_rows(batch_size: int) -> tuple[int, int]:
    """The first row of a micro-batch that this process's devices have, and how many rows they have."""
    rows = batch_size // jax.process_count()
    return jax.process_index() * rows, rows


def lower_step(computation: Computation, layout: Layout) -> jax.stages.Lowered:
    """The step of one device or of a mesh, perhaps of devices that you do not have; not compiled."""
    options: dict[str, Any] = {}
    if layout.mesh is not None:
        state = shardings(layout, computation.specs(layout))
        options = {
            "in_shardings": (state, shardings(layout, layout.batch_spec(1))),
            "out_shardings": (state, shardings(layout, PartitionSpec())),
        }
    step = jax.jit(functools.partial(computation.train_step, layout=layout), donate_argnums=0, **options)
    return step.lower(abstract_state(computation.model, computation.optim), computation.labels)
