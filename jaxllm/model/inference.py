"""The form of a model for generation and evaluation: its matrices in the compute dtype, without float32 masters."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.model.decoder import CustomLLM, model_facts, split_model
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layers import ParameterFacts


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
        if not known.decays or "score" in known.axes:  # norms and biases, or a router
            return weight
        return weight.astype(model.dtype)

    @jax.jit
    def all_narrowed(params: Pytree) -> Pytree:
        return jax.tree.map(narrowed, params, facts)

    return nnx.merge(graph, all_narrowed(params), bias)
