"""A model as it is kept to generate and evaluate: its matrices in the compute dtype, and no float32 masters."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.decoder import CustomLLM, model_facts, split_model
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layers import ParameterFacts


def is_narrow(known: ParameterFacts) -> bool:
    """Whether a weight may be held in bfloat16: a matrix or embeddings, and no norm, bias or router."""
    return known.decays and "score" not in known.axes


def for_inference(model: CustomLLM) -> CustomLLM:
    """A bfloat16 model with its matrices and embeddings in bfloat16: half of the memory, and of what a token reads.

    Norms, biases and routers compute in float32 and stay as they are. The new model computes the same numbers. It can
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
