"""Documents that share a row: the logits of transformers' models, and of torch_ref's, with the same `position_ids`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.config.families import read_config
from jaxllm.model.decoder import abstract_model
from parity_tests.deepseek_cases import CASES
from parity_tests.forward import jax_precision, jax_weights, random_weights, torch_model

CUSTOM = ModelConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=24,
    max_position_embeddings=192,
)  # fmt: skip
LENGTHS = (70, 1, 40, 29)
"""More than a block of queries in all."""


@pytest.mark.parametrize(
    "name", ["customllm", "glm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v3-halves", "v2"))]
)
def test_packed_documents_have_the_logits_of_the_same_position_ids(name):
    case = CASES.get(name)
    config = CUSTOM if case is None else read_config(case)
    weights = random_weights(config)
    ids = np.random.default_rng(0).integers(0, 97, (1, sum(LENGTHS)), np.int32)
    positions = np.concatenate([np.arange(length) for length in LENGTHS])[None]
    documents = np.repeat(np.arange(1, len(LENGTHS) + 1, dtype=np.int32), LENGTHS)[None]
    model = torch_model(config, weights, "float64", case)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), position_ids=torch.from_numpy(positions), use_cache=False).logits
        alone = model(torch.from_numpy(ids).long(), use_cache=False).logits
    with jax_precision("float64"):
        graph, _, _ = abstract_model(config, dtype=jnp.float64)
        ours = np.asarray(nnx.merge(graph, *jax_weights(weights, "float64"))(jnp.asarray(ids), jnp.asarray(documents)))
    scale = np.abs(theirs.numpy()).max()
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-12 * scale)
    assert np.abs(ours - alone.numpy()).max() > 1e-3 * scale  # without them the documents see each other
