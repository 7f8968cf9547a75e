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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.config import AXES, TrainConfig
from jaxllm.errors import UserError
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.train.sharding import choose_mesh, shardings
from jaxllm.train.state import TrainState, abstract_state, init_state, state_specs
from jaxllm.train.step import StepMetrics, eval_step, train_step


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
    def compile(self, config: TrainConfig, graph: nnx.GraphDef) -> tuple[Callable, Callable]:
        """`Programs.step` and `Programs.evaluate`."""

    def state_shardings(self, config: TrainConfig) -> TrainState | None:
        """Where a checkpoint restores each array of the state; None: on the first device."""
        return None

    def weight_shardings(self, config: TrainConfig) -> tuple[Pytree, Pytree] | jax.sharding.Sharding:
        """Where parameters and routing bias are read to: a sharding of each of their arrays, or one of all."""
        kept = self.state_shardings(config)
        if kept is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return kept.params, kept.routing_bias

    def init(self, config: TrainConfig) -> TrainState:
        """A new run's state, in the form that the programs take."""
        return jax.jit(functools.partial(init_state, config), out_shardings=self.state_shardings(config))()

    def shard(self, state: TrainState) -> TrainState:
        """From the form of one device to the form that the programs take."""
        return state

    def unshard(self, state: TrainState) -> TrainState:
        """Back to the form of one device; on a mesh the arrays stay spread over its devices."""
        return state


def choose_placement(config: TrainConfig) -> Placement:
    """The placement that a config asks for, on the devices here.

    Raises a UserError if there are too few devices, or if they do not divide the batch.
    """
    if config.mesh.parallel == "pmap":
        return Pmap(config)
    if config.mesh.sizes or jax.process_count() > 1:
        return OnMesh(choose_mesh(config))
    return OneDevice()


def compile_programs(placement: Placement, config: TrainConfig, graph: nnx.GraphDef) -> Programs:
    """Trace and compile what a run executes; the state's shapes follow from the config."""
    start = time.perf_counter()
    return Programs(*placement.compile(config, graph), time.perf_counter() - start)


class OneDevice(Placement):
    """The first device."""

    layout = ONE_DEVICE

    def describe(self) -> str:
        here = len(jax.devices())
        return "one device" + (f" of {here}: pass --mesh or --parallel pmap to use more" if here > 1 else "")

    def compile(self, config: TrainConfig, graph: nnx.GraphDef) -> tuple[Callable, Callable]:
        evaluate = _compile_evaluation(config, graph, ONE_DEVICE)
        step = lower_step(config, graph, ONE_DEVICE).compile()
        return step, lambda state, labels: evaluate(state.params, state.routing_bias, labels)


class OnMesh(Placement):
    """A mesh of devices, perhaps of several processes. Each part of a state is made and restored where it is kept."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def describe(self) -> str:
        return "mesh " + " x ".join(f"{axis}={getattr(self.layout, axis)}" for axis in AXES)

    def state_shardings(self, config: TrainConfig) -> TrainState:
        return shardings(self.layout, state_specs(config, self.layout))

    def compile(self, config: TrainConfig, graph: nnx.GraphDef) -> tuple[Callable, Callable]:
        layout, kept = self.layout, self.state_shardings(config)
        rows = shardings(layout, layout.batch_spec(0))
        evaluate = _compile_evaluation(config, graph, layout, in_shardings=(kept.params, kept.routing_bias, rows))
        step = lower_step(config, graph, layout).compile()
        if jax.process_count() == 1:
            return step, lambda state, labels: evaluate(state.params, state.routing_bias, labels)
        first, _ = local_rows(config)

        def global_batch(local: np.ndarray, axis: int, start: int) -> Array:
            """A batch over all processes, of which this one has the rows from `start` on."""
            shape = (*local.shape[:axis], config.data.batch_size, *local.shape[axis + 1 :])

            def part(index: Any) -> np.ndarray:  # a slice for each axis
                rows = index[axis]
                return local[(*index[:axis], slice(rows.start - start, rows.stop - start))]

            return jax.make_array_from_callback(shape, shardings(layout, layout.batch_spec(axis)), part)

        return (
            lambda state, labels: step(state, global_batch(labels, 1, first)),
            lambda state, labels: evaluate(state.params, state.routing_bias, global_batch(labels, 0, 0)),
        )


def _compile_evaluation(config: TrainConfig, graph: nnx.GraphDef, layout: Layout, **options: Any) -> Callable:
    state = abstract_state(config)
    evaluate = jax.jit(functools.partial(eval_step, config, graph, layout=layout), **options)
    return evaluate.lower(state.params, state.routing_bias, _labels(config)).compile()


class Pmap(Placement):
    """All devices of this process, each with a copy of the model and local rows of the batch."""

    def __init__(self, config: TrainConfig):
        devices = len(jax.devices())
        if jax.process_count() > 1:
            raise UserError("parallel is 'pmap': that is for the devices of one process, pass --mesh instead")
        if config.data.batch_size % devices:
            raise UserError(
                f"batch_size is {config.data.batch_size}: under --parallel pmap it must be a multiple of the "
                f"{devices} devices here, which share its rows"
            )
        self.layout = Layout(data=devices)

    def describe(self) -> str:
        return f"pmap over {self.layout.devices} devices, each with a copy of the model"

    def init(self, config: TrainConfig) -> TrainState:
        return self.shard(OneDevice().init(config))

    def shard(self, state: TrainState) -> TrainState:
        return jax.pmap(lambda _, state: state, in_axes=(0, None))(np.arange(self.layout.devices), state)

    def unshard(self, state: TrainState) -> TrainState:
        return _first_copy(state)

    def compile(self, config: TrainConfig, graph: nnx.GraphDef) -> tuple[Callable, Callable]:
        layout, n = self.layout, self.layout.devices

        def by_device(labels: np.ndarray, axis: int) -> np.ndarray:
            """A batch with the devices' axis in front."""
            parts = labels.reshape(*labels.shape[:axis], n, -1, *labels.shape[axis + 1 :])
            return np.moveaxis(parts, axis, 0)

        state = jax.eval_shape(jax.vmap(lambda _: init_state(config)), jnp.arange(n))
        step = jax.pmap(functools.partial(train_step, config, graph, layout=layout), "data", donate_argnums=0)
        step = step.lower(state, jax.eval_shape(lambda x: by_device(x, 1), _step_labels(config))).compile()
        evaluate = jax.pmap(functools.partial(eval_step, config, graph, layout=layout), "data")
        labels = jax.eval_shape(lambda x: by_device(x, 0), _labels(config))
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


def local_rows(config: TrainConfig) -> tuple[int, int]:
    """The first row of a micro-batch that this process's devices have, and how many rows they have."""
    rows = config.data.batch_size // jax.process_count()
    return jax.process_index() * rows, rows


def lower_step(config: TrainConfig, graph: nnx.GraphDef, layout: Layout) -> jax.stages.Lowered:
    """The step of one device or of a mesh, which need not be here; not compiled."""
    options: dict[str, Any] = {}
    if layout.mesh is not None:
        kept = shardings(layout, state_specs(config, layout))
        options = {
            "in_shardings": (kept, shardings(layout, layout.batch_spec(1))),
            "out_shardings": (kept, shardings(layout, PartitionSpec())),
        }
    step = functools.partial(train_step, config, graph, layout=layout)
    return jax.jit(step, donate_argnums=0, **options).lower(abstract_state(config), _step_labels(config))


def _labels(config: TrainConfig) -> jax.ShapeDtypeStruct:  # (B,T)
    return jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), jnp.int32)


def _step_labels(config: TrainConfig) -> jax.ShapeDtypeStruct:  # (A,B,T)
    return jax.ShapeDtypeStruct((config.data.grad_accum, config.data.batch_size, config.data.seq_len), jnp.int32)
