"""What the programs of a run depend on, apart from the rest of its config."""

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig, Precision, RunConfig
from jaxllm.config.groups import OptimConfig, ScheduleConfig
from jaxllm.model.decoder import abstract_model
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.train.state import TrainState, init_state, state_specs
from jaxllm.train.step import StepMetrics, eval_step, train_step


@dataclass(frozen=True)
class Computation:
    """The functions that a run compiles. Hashable: runs for which it is equal have the same programs."""

    model: ModelConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    precision: Precision
    remat: bool
    seed: int
    shape: tuple[int, int, int]
    """(A,B,T): micro-batches of a step, rows of each over all devices, tokens of a row."""
    platform: str | None = None
    """Whose kernels to use (`kernels.choose_kernels`); None: those of the device here."""
    without: tuple[str, ...] = ()
    """The kernels that have their plain form."""

    @classmethod
    def of(cls, config: RunConfig, platform: str | None = None, without: Collection[str] = ()) -> Self:
        shape = (config.data.grad_accum, config.data.batch_size, config.data.seq_len)
        step = (config.model, config.optim, config.schedule, config.decided_precision, config.remat)
        return cls(*step, config.seed, shape, platform, tuple(without))

    @property
    def graph(self) -> nnx.GraphDef:
        """The static part of the model."""
        return _model_graph(self.model, self.precision, self.remat, self.platform, self.without)

    @property
    def labels(self) -> jax.ShapeDtypeStruct:
        """The labels of a step, over all devices: (A,B,T) int32."""
        return jax.ShapeDtypeStruct(self.shape, jnp.int32)

    def init_state(self) -> TrainState:
        """A new run's state."""
        return init_state(self.model, self.optim, self.seed)

    def specs(self, layout: Layout) -> TrainState:
        """Where a mesh keeps the state."""
        return state_specs(self.model, self.optim, layout)

    def train_step(
        self, state: TrainState, labels: Array, layout: Layout = ONE_DEVICE
    ) -> tuple[TrainState, StepMetrics]:
        return train_step(self.optim, self.schedule, self.graph, state, labels, layout=layout)

    def eval_step(
        self, params: Pytree, routing_bias: Pytree, labels: Array, layout: Layout = ONE_DEVICE
    ) -> tuple[Array, Array]:
        return eval_step(self.graph, params, routing_bias, labels, layout)


@functools.cache
def _model_graph(
    model: ModelConfig, precision: Precision, remat: bool, platform: str | None, without: tuple[str, ...]
) -> nnx.GraphDef:
    options = {"remat": remat, "platform": platform, "without": without}
    return abstract_model(model, dtype=jnp.dtype(precision), **options)[0]
