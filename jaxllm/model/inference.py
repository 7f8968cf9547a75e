"""The form of a model for generation and evaluation: its matrices in a narrow dtype, without float32 masters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.decoder import CustomLLM, model_facts, split_model
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layers import ParameterFacts

Hold = Callable[[ParameterFacts, Any], Any]
"""Chooses the dtype in which an array of weights is held, from its facts and its stored dtype: the narrowest that has
all values which the file or the checkpoint has for it (for FP8 bfloat16, to which a product with a scale is rounded
unless float32 is chosen). The readers `convert.to_flax.read_model` and `jaxllm.store.checkpoint.load_weights` take one.
`masters`, `as_stored` and `for_compute` are some; to freeze a model in bfloat16, pass `for_compute(jnp.bfloat16)`."""


def masters(facts: ParameterFacts, stored: Any) -> Any:
    """Float32, to train."""
    return jnp.float32


def as_stored(facts: ParameterFacts, stored: Any) -> Any:
    """Matrices and embeddings in their stored dtype. Norms, biases and routers, which compute in float32, in that."""
    return stored if is_narrow(facts) else jnp.float32


def for_compute(dtype: Any) -> Hold:
    """What a model of this compute dtype needs: bfloat16 matrices where it is bfloat16; else `as_stored`."""
    if dtype != jnp.bfloat16:
        return as_stored
    return lambda facts, stored: dtype if is_narrow(facts) else jnp.float32


def is_narrow(facts: ParameterFacts) -> bool:
    """Whether a weight may be held in bfloat16: it is neither a norm nor a bias nor a router."""
    return facts.decays and "score" not in facts.axes


def for_inference(model: CustomLLM) -> CustomLLM:
    """A bfloat16 model with its matrices and embeddings in bfloat16: half of the memory, and of what a token reads.

    Norms, biases and routers compute in float32 and are unchanged. The new model computes the same numbers. It can
    be exported, but not trained. The masters are freed when nothing refers to the given model. A model of another
    dtype is returned as it is.
    """
    if model.dtype != jnp.bfloat16:
        return model
    graph, params, bias = split_model(model)
    facts, _ = model_facts(model.config)

    def narrowed(weight: Array, known: ParameterFacts) -> Array:
        return weight.astype(model.dtype) if is_narrow(known) else weight

    @jax.jit
    def all_narrowed(params: Pytree) -> Pytree:
        return jax.tree.map(narrowed, params, facts)

    return nnx.merge(graph, all_narrowed(params), bias)
