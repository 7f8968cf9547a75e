"""The state of a training run: what a step changes, and how a mesh shards it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Int, UInt32

from jaxllm.config import ModelConfig
from jaxllm.config.groups import OptimConfig
from jaxllm.model.decoder import CustomLLM, abstract_model, model_facts, split_model
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import Layout
from jaxllm.model.numerics import random_key
from jaxllm.train.optim import OptimizerState, of_adamw


class TrainState(NamedTuple):
    """All that a step changes; a plain pytree of arrays."""

    params: Pytree  # nested dict of float32 masters, stacked over layers and experts
    routing_bias: Pytree  # nested dict with one (L,E) leaf, or none where no bias steers the choice
    opt_state: OptimizerState
    step: Int[Array, ""]  # steps done, including those that were not finite and changed nothing else
    dropout_key: UInt32[Array, "2"]  # raw key data; each step and micro-batch folds its number in


def init_state(model: ModelConfig, optim: OptimConfig, seed: int) -> TrainState:
    """A new run: fresh weights, zero moments, step 0."""
    model_key, _ = jax.random.split(random_key(seed))
    _, params, routing_bias = split_model(CustomLLM(model, rngs=nnx.Rngs(params=model_key)))
    return start_state(model, optim, seed, params, routing_bias)


def start_state(model: ModelConfig, optim: OptimConfig, seed: int, params: Pytree, routing_bias: Pytree) -> TrainState:
    """Step 0 on given weights."""
    moments, step = OptimizerState.zeros(model, optim, params), jnp.zeros((), jnp.int32)
    return TrainState(params, routing_bias, moments, step, dropout_key(seed))


@functools.lru_cache(16)
def abstract_state(model: ModelConfig, optim: OptimConfig) -> TrainState:
    """The state's shapes: takes no memory."""
    _, params, routing_bias = abstract_model(model)
    return jax.eval_shape(lambda: start_state(model, optim, 0, params, routing_bias))


def dropout_key(seed: int) -> UInt32[Array, "2"]:
    """The raw key data from which all dropout of a run is drawn."""
    return jax.random.key_data(jax.random.split(random_key(seed))[1])


def state_specs(model: ModelConfig, optim: OptimConfig, layout: Layout) -> TrainState:
    """The PartitionSpec of each array of the state: moments are sharded like their parameters."""
    params, routing_bias = weight_specs(model, layout)
    whole: Any = PartitionSpec()
    moments = OptimizerState(whole, params, of_adamw(model, optim, params))
    return TrainState(params, routing_bias, moments, step=whole, dropout_key=whole)


def weight_specs(model: ModelConfig, layout: Layout) -> tuple[Pytree, Pytree]:
    """The PartitionSpec of each parameter and routing bias."""
    return jax.tree.map(lambda facts: layout.parameter_spec(facts.axes), model_facts(model))
