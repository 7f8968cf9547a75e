"""A run's config, placement, static model and compiled programs, as one object."""

import functools
import time
from collections.abc import Collection
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from jaxllm.config import TrainConfig
from jaxllm.model.adapters import merged_weights
from jaxllm.model.batch import token_batch
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.train.computation import Computation
from jaxllm.train.optim import StepNumbers
from jaxllm.train.placement import Placement, Programs, choose_placement, on_one_device, shared_programs
from jaxllm.train.state import TrainState
from jaxllm.train.step import StepMetrics, merged


class Trainer:
    """Computes the steps of a run. States that it takes and returns have the form of its placement.

    Args:
        placement: None is the one that the config requests, on the available devices.
        without: kernels that have their plain form (`kernels.REPLACEABLE`).
    """

    def __init__(self, config: TrainConfig, placement: Placement | None = None, without: Collection[str] = ()):
        self.config = config
        mesh, batch_size = config.mesh, config.data.batch_size
        self.placement = choose_placement(mesh, batch_size) if placement is None else placement
        self.computation = Computation.of(config, without=without)
        self.graph, self._numbers = self.computation.graph, StepNumbers.of(config.optim, config.schedule)

    def init(self, weights: tuple[Pytree, Pytree] | None = None) -> TrainState:
        """A new run's state: with these parameters and routing bias, which are donated, or fresh ones."""
        if weights is None:
            return self.placement.init(self.computation)
        # each moment is made where it is kept
        start = jax.jit(self.computation.start_state, donate_argnums=(0, 1), out_shardings=self.state_shardings)
        return self.placement.shard(start(*weights))

    def init_adapted(self, weights: tuple[Pytree, Pytree], adapters: Pytree | None) -> TrainState:
        """A new run's state on frozen weights and their routing bias, with these adapters, or some from the seed."""
        where = self.state_shardings

        @functools.partial(jax.jit, out_shardings=where and where._replace(frozen={}))
        def drawn() -> TrainState:
            return self.computation.init_state()._replace(frozen={})

        state = self.with_base(drawn(), weights)
        if adapters is not None:
            state = state._replace(params=jax.device_put(adapters, where and where.params))
        return self.placement.shard(state)

    def with_base(self, state: TrainState, weights: tuple[Pytree, Pytree]) -> TrainState:
        """A state of adapters, in the form of one device, with the weights and the routing bias that they belong to."""
        where, shapes = self.state_shardings, self.computation.state
        frozen, bias = jax.tree.map(
            lambda leaf, shape: leaf.astype(shape.dtype, copy=False),
            tuple(weights),
            (shapes.frozen, shapes.routing_bias),
        )
        frozen = jax.device_put(frozen, where and where.frozen)
        return state._replace(frozen=frozen, routing_bias=jax.device_put(bias, where and where.routing_bias))

    @property
    def state_shardings(self) -> TrainState | None:
        """Where a checkpoint restores each array of the state; None: on the first device."""
        return self.placement.state_shardings(self.computation)

    def compile(self) -> float:
        """Compile the programs, unless that is done; returns the seconds it took.

        Runs of one process with an equal placement and computation share them.
        """
        start = time.perf_counter()
        _ = self._programs
        return time.perf_counter() - start

    @functools.cached_property
    def _programs(self) -> Programs:
        return shared_programs(self.placement, self.computation)

    def step(self, state: TrainState, rows: np.ndarray) -> tuple[TrainState, StepMetrics]:
        """One optimizer step on this process's rows of the batch (`jaxllm.model.batch`): (A*B,T) int32. The given state
        is donated."""
        data = self.config.data
        batch = token_batch(rows.reshape(data.grad_accum, -1, data.seq_len), data)
        return self._programs.step(state, batch, self._numbers)

    def evaluate(self, state: TrainState, rows: np.ndarray) -> tuple[Array, Array]:
        """Summed cross-entropy in nats, and number of targets, of stored rows (B,T) that all processes have."""
        return self._programs.evaluate(state, token_batch(rows, self.config.data))

    def unshard(self, state: TrainState) -> TrainState:
        """The state in the form of one device, in which it is saved."""
        return self.placement.unshard(state)

    @property
    def merged_graph(self) -> nnx.GraphDef:
        """The static part of the model of `weights`."""
        return replace(self.computation, lora=None).graph

    def weights(self, state: TrainState) -> tuple[Pytree, Pytree]:
        """Parameters and routing bias, adapters merged, whole on one device. All processes must call it.

        Adapters are merged in the place of the state's frozen matrices, which are donated.
        """
        state = self.unshard(state)
        params = state.params
        if self.computation.lora is not None:
            params = merged_weights(merged(self.graph, params, state.routing_bias, state.frozen))
        return on_one_device(self.placement.layout, (params, state.routing_bias))
