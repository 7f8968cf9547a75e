"""What the programs of a run depend on, apart from the rest of its config."""

import functools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from jaxllm.config import LoraConfig, ModelConfig, Precision, RunConfig
from jaxllm.config.groups import OptimConfig, ScheduleConfig
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import abstract_adapted, abstract_model
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.train.optim import UNREAD, StepNumbers, without_numbers
from jaxllm.train.state import TrainState, abstract_state, init_state, start_state, state_specs
from jaxllm.train.step import StepMetrics, eval_step, train_step


@dataclass(frozen=True)
class Computation:
    """The functions that a run compiles. Hashable: runs for which it is equal have the same programs."""

    model: ModelConfig
    optim: OptimConfig
    """Without the run's numbers that are arguments of a step (`StepNumbers`)."""
    schedule: Literal["cosine", "wsd"]
    precision: Precision
    remat: bool
    seed: int
    shape: tuple[int, int, int]
    """(A,B,T): micro-batches of a step, rows of each over all devices, tokens of a row."""
    has_targets: bool = False
    has_documents: bool = False
    """Which arrays of a batch there are: see `TokenBatch`."""
    platform: str | None = None
    """Whose kernels to use (`kernels.choose_kernels`); None: those of the default device."""
    lora: LoraConfig | None = None
    """The adapters, which are then all that is trained."""
    without: tuple[str, ...] = ()
    """The kernels that have their plain form."""

    @classmethod
    def of(cls, config: RunConfig, platform: str | None = None, without: Collection[str] = ()) -> "Computation":
        data = config.data
        shape = (data.grad_accum, data.batch_size, data.seq_len)
        step = (
            config.model,
            without_numbers(config.optim),
            config.schedule.schedule,
            config.decided_precision,
            config.remat,
        )
        arrays = (data.has_targets, data.documents == "separate")
        return cls(*step, config.seed, shape, *arrays, platform, config.adapters, tuple(without))

    @property
    def graph(self) -> nnx.GraphDef:
        """The static part of the model."""
        options = {"remat": self.remat, "platform": self.platform, "without": self.without}
        return _model_graph(self.model, self.lora, dtype=jnp.dtype(self.precision), **options)

    @property
    def state(self) -> TrainState:
        """The shapes of the state."""
        return abstract_state(self.model, self.optim, self.lora)

    @property
    def batch(self) -> TokenBatch:
        """The shapes of a step's batch, over all devices: (A,B,T) int32."""
        shape = jax.ShapeDtypeStruct(self.shape, jnp.int32)
        return TokenBatch(shape, shape if self.has_targets else None, shape if self.has_documents else None)

    @property
    def numbers(self) -> StepNumbers:
        """The shapes of a step's numbers."""
        scalars = StepNumbers.of(UNREAD, replace(ScheduleConfig(), schedule=self.schedule))
        return jax.tree.map(lambda scalar: jax.ShapeDtypeStruct((), scalar.dtype), scalars)

    def init_state(self) -> TrainState:
        """A new run's state."""
        return init_state(self.model, self.optim, self.seed, self.lora)

    def start_state(self, params: Pytree, routing_bias: Pytree) -> TrainState:
        """A new run's state on given weights."""
        return start_state(self.model, self.optim, self.seed, params, routing_bias)

    def specs(self, layout: Layout) -> TrainState:
        """How a mesh shards the state."""
        return state_specs(self.model, self.optim, layout, self.lora)

    def train_step(
        self, state: TrainState, batch: TokenBatch, numbers: StepNumbers, layout: Layout = ONE_DEVICE
    ) -> tuple[TrainState, StepMetrics]:
        return train_step(self.optim, self.graph, state, batch, numbers, layout=layout)

    def eval_step(
        self, params: Pytree, routing_bias: Pytree, batch: TokenBatch, frozen: Pytree = (), layout: Layout = ONE_DEVICE
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        return eval_step(self.graph, params, routing_bias, batch, layout, frozen or {})


@functools.lru_cache(16)
def _model_graph(model: ModelConfig, lora: LoraConfig | None, **options: Any) -> nnx.GraphDef:
    return (abstract_model(model, **options) if lora is None else abstract_adapted(model, lora, **options))[0]
