"""Where a run's state lies and what executes its step: on one device, on a mesh of them, or under `pmap`.

Outside a step a state has one form, that of one device: so it is saved, restored and handed on, whatever layout it was
trained on. `place` brings it into the form that the layout's programs take, `unplaced` back.

    one device   TrainState
    mesh         the same arrays, cut as `sharding` says; the experts padded to a multiple of the axis
    pmap         each array with a leading axis, a copy a device
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.config import AXES, TrainConfig
from jaxllm.errors import UserError
from jaxllm.sharding import ONE_DEVICE, Layout, make_mesh, pad_experts, stored_experts, unpad_experts
from jaxllm.step import TrainState, eval_step, init_state, train_step

Pytree = Any


class Programs(NamedTuple):
    step: Callable  # (state, (A,B,T) labels) -> state, metrics; donates the state
    evaluate: Callable  # (state, (B,T) labels) -> summed cross-entropy, targets
    seconds: float  # to trace both and to compile them, or read them from the cache


def choose_layout(config: TrainConfig) -> Layout:
    """The layout that a config asks for, on the devices here.

    Raises:
        UserError: there are too few devices, or they do not divide the batch.
    """
    here = jax.devices()
    if jax.process_count() > 1:
        here = sorted(here, key=lambda device: (device.process_index, device.id))
        if config.parallel == "pmap":
            raise UserError("parallel is 'pmap': that is for the devices of one process, pass --mesh instead")
        if config.mesh_devices != len(here):
            raise UserError(
                f"mesh is {config.mesh!r}: {jax.process_count()} processes run one step on a mesh of all their "
                f"{len(here)} devices, such as --mesh data={len(here)}"
            )
    if config.parallel == "pmap":
        if config.batch_size % len(here):
            raise UserError(
                f"batch_size is {config.batch_size}: under --parallel pmap it must be a multiple of the "
                f"{len(here)} devices here, which share its rows"
            )
        return Layout(data=len(here))
    if not config.mesh_sizes:
        return ONE_DEVICE
    wanted = config.mesh_devices
    if wanted > len(here):
        raise UserError(
            f"mesh is {config.mesh!r}: it needs {wanted} devices, and {len(here)} "
            f"{'is' if len(here) == 1 else 'are'} here; pass a smaller --mesh "
            f"(to simulate more on a CPU: JAX_NUM_CPU_DEVICES={wanted})"
        )
    return make_mesh(here[:wanted], **config.mesh_sizes)


def describe_layout(config: TrainConfig, layout: Layout) -> str:
    """The layout in words, for a line at start-up."""
    here = len(jax.devices())
    if layout.devices == 1:
        idle = f" of {here}: pass --mesh or --parallel pmap to use more" if here > 1 else ""
        return f"one device{idle}"
    if layout.mesh is None:
        return f"pmap over {layout.devices} devices, each with a copy of the model"
    sizes = " x ".join(f"{axis}={getattr(layout, axis)}" for axis in AXES)
    stored = stored_experts(config.model, layout)
    padding = stored - config.model.n_routed_experts
    experts = f"; {stored // layout.expert} routed experts a device" if layout.expert > 1 else ""
    return f"mesh {sizes}{experts}{f' ({padding} of {stored} are padding)' if padding else ''}"


def new_state(config: TrainConfig, layout: Layout) -> TrainState:
    """A new run's state, placed; a mesh makes each part where it lies."""
    if layout.mesh is None:
        return place(config, layout, jax.jit(functools.partial(init_state, config))())
    shardings = layout.shardings(layout.specs(padded_shapes(config, layout)))
    return jax.jit(lambda: pad_experts(init_state(config), config.model, layout), out_shardings=shardings)()


def state_shardings(config: TrainConfig, layout: Layout) -> Pytree | None:
    """Where a mesh has each array of a state in the form of one device; None without one."""
    if layout.mesh is None:
        return None
    return layout.shardings(layout.specs(jax.eval_shape(functools.partial(init_state, config))))


def place(config: TrainConfig, layout: Layout, state: TrainState) -> TrainState:
    """From the form of one device to that of the layout."""
    if layout.mesh is not None:
        if stored_experts(config.model, layout) == config.model.n_routed_experts:
            return state  # it was restored to where it belongs
        shardings = layout.shardings(layout.specs(padded_shapes(config, layout)))
        return jax.jit(lambda state: pad_experts(state, config.model, layout), out_shardings=shardings)(state)
    if layout.devices > 1:
        return jax.pmap(lambda _, state: state, in_axes=(0, None))(np.arange(layout.devices), state)
    return state


def unplaced(config: TrainConfig, layout: Layout, state: TrainState) -> TrainState:
    """Back to the form of one device; on a mesh the arrays stay spread over its devices."""
    if layout.mesh is not None:
        if stored_experts(config.model, layout) == config.model.n_routed_experts:
            return state
        return _unpadding(config, layout)(state)
    if layout.devices > 1:
        return _first_copy(state)
    return state


@functools.cache
def _unpadding(config: TrainConfig, layout: Layout) -> Callable:
    """One program for all the saves of a run."""
    shardings = state_shardings(config, layout)
    return jax.jit(lambda state: unpad_experts(state, config.model), out_shardings=shardings)


def _first_copy(tree: Pytree) -> Pytree:
    """What the first device of this process holds of arrays with an axis of devices in front; the others do nothing."""
    return jax.tree.map(lambda copies: copies.addressable_data(0)[0], tree)


def on_one_device(layout: Layout, tree: Pytree) -> Pytree:
    """Arrays of `unplaced`, whole on the first device of this process; all processes must ask."""
    if jax.process_count() == 1:
        return jax.device_put(tree, jax.devices()[0])
    whole = jax.jit(lambda tree: tree, out_shardings=layout.shardings(PartitionSpec()))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def rows_here(config: TrainConfig) -> tuple[int, int]:
    """The first row of a micro-batch that this process's devices have, and how many rows they have."""
    rows = config.batch_size // jax.process_count()
    return jax.process_index() * rows, rows


def compile_programs(
    config: TrainConfig, graph: nnx.GraphDef, state: TrainState, layout: Layout = ONE_DEVICE
) -> Programs:
    """What a run executes, ready to run on a placed state like the one given."""
    start = time.perf_counter()
    # By shapes alone: a restored state is bound to its device, a fresh one is not, and the cache would tell them apart.
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)  # (B,T)
    make = _pmapped if layout.devices > 1 and layout.mesh is None else _jitted
    step, evaluate = make(config, graph, layout, state, rows)
    return Programs(step, evaluate, time.perf_counter() - start)


def lower_step(config: TrainConfig, graph: nnx.GraphDef, layout: Layout, state: TrainState) -> jax.stages.Lowered:
    """The step of one device or of a mesh, which need not be here, on a state of `padded_shapes`; not compiled."""
    labels = _labels(config)
    shardings: dict[str, Any] = {}
    if layout.mesh is not None:
        own = layout.shardings(layout.specs(state))
        shardings = {
            "in_shardings": (own, layout.shardings(layout.batch_spec(1))),
            "out_shardings": (own, layout.shardings(PartitionSpec())),
        }
    step = functools.partial(train_step, config, graph, layout=layout)
    return jax.jit(step, donate_argnums=0, **shardings).lower(state, labels)


def padded_shapes(config: TrainConfig, layout: Layout) -> TrainState:
    """The shapes of a placed state of one device or of a mesh."""
    return jax.eval_shape(lambda: pad_experts(init_state(config), config.model, layout))


def _labels(config: TrainConfig) -> jax.ShapeDtypeStruct:  # (A,B,T)
    return jax.ShapeDtypeStruct((config.grad_accum, config.batch_size, config.seq_len), jnp.int32)


def _jitted(config, graph, layout, state, rows) -> tuple[Callable, Callable]:
    shardings = {}
    if layout.mesh is not None:
        weights = layout.shardings(layout.specs((state.params, state.routing_bias)))
        shardings = {"in_shardings": (*weights, layout.shardings(layout.batch_spec(0)))}
    evaluate = jax.jit(functools.partial(eval_step, graph, layout=layout), **shardings)
    evaluate = evaluate.lower(state.params, state.routing_bias, rows).compile()
    step = lower_step(config, graph, layout, state).compile()
    if jax.process_count() == 1:
        return step, lambda state, rows: evaluate(state.params, state.routing_bias, rows)
    first, _ = rows_here(config)

    def spread(here: np.ndarray, axis: int, start: int) -> jax.Array:
        """A batch over all processes, of which this one has the rows from `start` on."""
        shape = (*here.shape[:axis], config.batch_size, *here.shape[axis + 1 :])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            rows = index[axis]
            return here[(*index[:axis], slice(rows.start - start, rows.stop - start))]

        return jax.make_array_from_callback(shape, layout.shardings(layout.batch_spec(axis)), part)

    return (
        lambda state, labels: step(state, spread(labels, 1, first)),
        lambda state, rows: evaluate(state.params, state.routing_bias, spread(rows, 0, 0)),
    )


def _pmapped(config, graph, layout, state, rows) -> tuple[Callable, Callable]:
    n = layout.devices

    def own_rows(batch: np.ndarray, axis: int) -> np.ndarray:
        """A batch with the devices' axis in front."""
        parts = batch.reshape(*batch.shape[:axis], n, -1, *batch.shape[axis + 1 :])
        return np.moveaxis(parts, axis, 0)

    step = jax.pmap(functools.partial(train_step, config, graph, layout=layout), axis_name="data", donate_argnums=0)
    step = step.lower(state, jax.eval_shape(functools.partial(own_rows, axis=1), _labels(config))).compile()
    evaluate = jax.pmap(functools.partial(eval_step, graph, layout=layout), axis_name="data")
    shape = jax.eval_shape(functools.partial(own_rows, axis=0), rows)
    evaluate = evaluate.lower(state.params, state.routing_bias, shape).compile()

    def run_step(state: TrainState, labels: np.ndarray):
        state, metrics = step(state, own_rows(labels, 1))
        return state, _first_copy(metrics)

    return run_step, lambda state, rows: _first_copy(evaluate(state.params, state.routing_bias, own_rows(rows, 0)))
