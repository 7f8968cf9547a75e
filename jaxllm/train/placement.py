"""Where a run's state lives and how its step runs: on one device, on a mesh of devices, or under `pmap`.

Outside a step every state has the form of one device: it is saved, restored and exported in this form. `shard` converts
it to the form that the placement's programs take, `unshard` converts it back.

    OneDevice   the state as it is
    OnMesh      the same arrays, cut along the axes of the mesh
    Pmap        each array with a leading axis, one copy a device
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxllm.config import AXES, LoraConfig, ModelConfig
from jaxllm.config.groups import MeshConfig, OptimConfig
from jaxllm.errors import UserError
from jaxllm.model.batch import TokenBatch
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.train.computation import Computation
from jaxllm.train.optim import StepNumbers
from jaxllm.train.sharding import choose_mesh, shardings
from jaxllm.train.state import TrainState, init_state, state_specs, weight_specs
from jaxllm.train.step import StepMetrics


class Programs(NamedTuple):
    """The compiled programs of a run."""

    step: Callable[[TrainState, TokenBatch, StepNumbers], tuple[TrainState, StepMetrics]]  # (A,B,T); donates the state
    evaluate: Callable[[TrainState, TokenBatch], tuple[Array, Array]]  # (B,T) -> summed cross-entropy, targets


MAX_PROGRAMS = 16
"""Compiled programs of each kind that a process holds for later runs; they hold no arrays."""


class Placement(ABC):
    """Holds a state and runs its step. B are this process's rows of a batch."""

    layout: Layout

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Placement) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash((type(self), self.layout))

    @abstractmethod
    def describe(self) -> str:
        """A description of the placement, for a line at start-up."""

    @abstractmethod
    def compile(self, computation: Computation) -> tuple[Callable, Callable]:
        """`Programs.step` and `Programs.evaluate`."""

    def state_shardings(self, computation: Computation) -> TrainState | None:
        """Where a checkpoint restores each array of the state; None: on the first device."""
        return None

    def weight_shardings(self, model: ModelConfig) -> tuple[Pytree, Pytree] | jax.sharding.Sharding:
        """Where parameters and routing bias are read to: a sharding of each of their arrays, or one of all."""
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def init(self, computation: Computation) -> TrainState:
        """A new run's state, in the form that the programs take."""
        return _init_program(computation.model, computation.optim, computation.seed, self.layout, computation.lora)()

    def shard(self, state: TrainState) -> TrainState:
        """From the form of one device to the form that the programs take."""
        return state

    def unshard(self, state: TrainState) -> TrainState:
        """Back to the form of one device; on a mesh the arrays stay spread over its devices."""
        return state


def choose_placement(mesh: MeshConfig, batch_size: int) -> Placement:
    """The placement that a config requests, on the available devices.

    Raises a UserError if there are too few devices, or if they do not divide the batch.
    """
    if mesh.parallel == "pmap":
        return Pmap(batch_size)
    if mesh.sizes or jax.process_count() > 1:
        return OnMesh(choose_mesh(mesh))
    return OneDevice()


@functools.lru_cache(MAX_PROGRAMS)
def _init_program(
    model: ModelConfig, optim: OptimConfig, seed: int, layout: Layout, lora: LoraConfig | None
) -> Callable[[], TrainState]:
    specs = None if layout.mesh is None else shardings(layout, state_specs(model, optim, layout, lora))
    return jax.jit(functools.partial(init_state, model, optim, seed, lora), out_shardings=specs)


def compile_programs(placement: Placement, computation: Computation) -> Programs:
    """Trace and compile the programs of a run."""
    return Programs(*placement.compile(computation))


shared_programs = functools.lru_cache(MAX_PROGRAMS)(compile_programs)
"""The same for runs of this process that compute the same: they share the programs."""


class OneDevice(Placement):
    """The first device."""

    layout = ONE_DEVICE

    def describe(self) -> str:
        available = len(jax.devices())
        return "one device" + (f" of {available}: pass --mesh or --parallel pmap to use more" if available > 1 else "")

    def compile(self, computation: Computation) -> tuple[Callable, Callable]:
        evaluate = _compile_evaluation(computation, ONE_DEVICE)
        step = lower_step(computation, ONE_DEVICE).compile()
        return step, lambda state, batch: evaluate(state.params, state.routing_bias, batch, state.frozen)


class OnMesh(Placement):
    """A mesh of devices, perhaps of several processes. Each shard of a state is created and restored on its device."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def describe(self) -> str:
        return "mesh " + " x ".join(f"{axis}={getattr(self.layout, axis)}" for axis in AXES)

    def weight_shardings(self, model: ModelConfig) -> tuple[Pytree, Pytree]:
        return shardings(self.layout, weight_specs(model, self.layout)[:2])

    def state_shardings(self, computation: Computation) -> TrainState:
        return shardings(self.layout, computation.specs(self.layout))

    def compile(self, computation: Computation) -> tuple[Callable, Callable]:
        layout, state = self.layout, self.state_shardings(computation)
        rows = shardings(layout, layout.batch_spec(0))
        where = (state.params, state.routing_bias, rows, state.frozen)
        evaluate = _compile_evaluation(computation, layout, in_shardings=where)
        step = lower_step(computation, layout).compile()
        if jax.process_count() == 1:
            return step, lambda state, batch: evaluate(state.params, state.routing_bias, batch, state.frozen)
        batch_size = computation.shape[1]
        first, _ = local_rows(batch_size)

        def global_array(axis: int, start: int, local: np.ndarray) -> Array:
            """An array over all processes, of which this one has the rows from `start` on."""
            shape = (*local.shape[:axis], batch_size, *local.shape[axis + 1 :])

            def part(index: Any) -> np.ndarray:  # a slice for each axis
                rows = index[axis]
                return local[(*index[:axis], slice(rows.start - start, rows.stop - start))]

            return jax.make_array_from_callback(shape, shardings(layout, layout.batch_spec(axis)), part)

        def global_batch(batch: TokenBatch, axis: int, start: int) -> TokenBatch:
            return jax.tree.map(functools.partial(global_array, axis, start), batch)

        return (
            lambda state, batch, numbers: step(state, global_batch(batch, 1, first), numbers),
            lambda state, batch: evaluate(state.params, state.routing_bias, global_batch(batch, 0, 0), state.frozen),
        )


def _compile_evaluation(computation: Computation, layout: Layout, **options: Any) -> Callable:
    state = computation.state
    evaluate = jax.jit(functools.partial(computation.eval_step, layout=layout), **options)
    return evaluate.lower(state.params, state.routing_bias, _micro_batch(computation), state.frozen).compile()


def _micro_batch(computation: Computation) -> TokenBatch:  # (B,T)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), computation.batch)


class Pmap(Placement):
    """All devices of this process, each with a copy of the model and local rows of the batch."""

    def __init__(self, batch_size: int):
        devices = len(jax.devices())
        if jax.process_count() > 1:
            raise UserError("parallel is 'pmap': that is for the devices of one process, pass --mesh instead")
        if batch_size % devices:
            raise UserError(
                f"batch_size is {batch_size}: under --parallel pmap it must be a multiple of the "
                f"{devices} available devices, which share its rows"
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

        def by_device(batch: TokenBatch, axis: int) -> TokenBatch:
            """A batch with the devices' axis in front."""

            def parts(rows: np.ndarray) -> np.ndarray:
                return np.moveaxis(rows.reshape(*rows.shape[:axis], n, -1, *rows.shape[axis + 1 :]), axis, 0)

            return jax.tree.map(parts, batch)

        state = jax.eval_shape(jax.vmap(lambda _: computation.init_state()), np.arange(n))
        train_step = functools.partial(computation.train_step, layout=layout)
        step = jax.pmap(train_step, "data", in_axes=(0, 0, None), donate_argnums=0)
        batch = jax.eval_shape(lambda x: by_device(x, 1), computation.batch)
        step = step.lower(state, batch, computation.numbers).compile()
        evaluate = jax.pmap(functools.partial(computation.eval_step, layout=layout), "data")
        batch = jax.eval_shape(lambda x: by_device(x, 0), _micro_batch(computation))
        evaluate = evaluate.lower(state.params, state.routing_bias, batch, state.frozen).compile()

        def run_step(state: TrainState, batch: TokenBatch, numbers: StepNumbers) -> tuple[TrainState, StepMetrics]:
            state, metrics = step(state, by_device(batch, 1), numbers)
            return state, _first_copy(metrics)

        def run_evaluate(state: TrainState, batch: TokenBatch) -> tuple[Array, Array]:
            return _first_copy(evaluate(state.params, state.routing_bias, by_device(batch, 0), state.frozen))

        return run_step, run_evaluate


def _first_copy(tree: Pytree) -> Pytree:
    """The first device's copy of arrays whose first axis is that of the devices."""
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
        state, everywhere = shardings(layout, computation.specs(layout)), shardings(layout, PartitionSpec())
        options = {
            "in_shardings": (state, shardings(layout, layout.batch_spec(1)), everywhere),
            "out_shardings": (state, everywhere),
        }
    step = jax.jit(functools.partial(computation.train_step, layout=layout), donate_argnums=0, **options)
    return step.lower(computation.state, computation.batch, computation.numbers)
