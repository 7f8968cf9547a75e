"""The state of a training run: what a step changes, and how a mesh shards it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Int, UInt32

from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.config.groups import OptimConfig
from jaxllm.model.decoder import CustomLLM, abstract_model, model_facts, split_adapted, split_model
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.inference import is_narrow
from jaxllm.model.layers import ParameterFacts
from jaxllm.model.layout import Layout
from jaxllm.model.numerics import random_key
from jaxllm.train.optim import OptimizerState, of_adamw


class TrainState(NamedTuple):
    """All that a step changes, and the weights that it reads; a plain pytree of arrays."""

    params: Pytree  # nested dict of float32 masters, stacked over layers and experts; or adapters alone
    routing_bias: Pytree  # nested dict with one (L,E) leaf, or none where no bias steers the choice
    opt_state: OptimizerState
    step: Int[Array, ""]  # steps done, including those that were not finite and changed nothing else
    dropout_key: UInt32[Array, "2"]  # raw key data; each step and micro-batch folds its number in
    frozen: Pytree = {}  # noqa: RUF012  of a run with adapters: all weights, which no step changes and no checkpoint has


def init_state(model: ModelConfig, optim: OptimConfig, seed: int, lora: LoraConfig | None = None) -> TrainState:
    """A new run: fresh weights, zero moments, step 0. With `lora`, the frozen weights are random, too."""
    model_key, _ = jax.random.split(random_key(seed))
    made, frozen = CustomLLM(model, lora=lora, rngs=nnx.Rngs(params=model_key)), {}
    if lora is None:
        _, params, routing_bias = split_model(made)
    else:
        _, params, routing_bias, whole = split_adapted(made)
        frozen = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), whole, frozen_dtypes(model, lora))
    return start_state(model, optim, seed, params, routing_bias)._replace(frozen=frozen)


def frozen_dtypes(model: ModelConfig, lora: LoraConfig) -> Pytree:
    """The dtype in which each weight of a base is held: matrices in that of their files, the rest in float32."""

    def dtype(known: ParameterFacts) -> jnp.dtype:
        return jnp.dtype(lora.base_dtype if is_narrow(known) else jnp.float32)

    return jax.tree.map(dtype, model_facts(model)[0])


def start_state(model: ModelConfig, optim: OptimConfig, seed: int, params: Pytree, routing_bias: Pytree) -> TrainState:
    """Step 0 on given weights."""
    moments, step = OptimizerState.zeros(model, optim, params), jnp.zeros((), jnp.int32)
    return TrainState(params, routing_bias, moments, step, dropout_key(seed))


@functools.lru_cache(16)
def abstract_state(model: ModelConfig, optim: OptimConfig, lora: LoraConfig | None = None) -> TrainState:
    """The state's shapes: takes no memory."""
    if lora is not None:
        return jax.eval_shape(lambda: init_state(model, optim, 0, lora))
    _, params, routing_bias = abstract_model(model)
    return jax.eval_shape(lambda: start_state(model, optim, 0, params, routing_bias))


def dropout_key(seed: int) -> UInt32[Array, "2"]:
    """The raw key data from which all dropout of a run is drawn."""
    return jax.random.key_data(jax.random.split(random_key(seed))[1])


def state_specs(model: ModelConfig, optim: OptimConfig, layout: Layout, lora: LoraConfig | None = None) -> TrainState:
    """The PartitionSpec of each array of the state: moments are sharded like their parameters."""
    params, routing_bias, frozen = weight_specs(model, layout, lora)
    whole: Any = PartitionSpec()
    moments = OptimizerState(whole, params, of_adamw(model, optim, params))
    return TrainState(params, routing_bias, moments, step=whole, dropout_key=whole, frozen=frozen)


def weight_specs(model: ModelConfig, layout: Layout, lora: LoraConfig | None = None) -> tuple[Pytree, Pytree, Pytree]:
    """The PartitionSpec of each parameter, routing bias and frozen weight."""
    facts = (*model_facts(model, lora), {} if lora is None else model_facts(model)[0])
    return jax.tree.map(lambda known: layout.parameter_spec(known.axes), facts)
