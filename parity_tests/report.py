"""One comparison of the two frameworks, from weights to loss: used by the command line and by the tests alike."""

from __future__ import annotations

import numpy as np

from jaxllm.checkpoint import Weights
from jaxllm.config import ModelConfig
from parity_tests.compare import TOLERANCES, Row, compare_experts, compare_hidden, compare_results, compare_weights
from parity_tests.forward import jax_forward, state_dict_arrays, torch_forward
from torch_ref import CustomLLM as TorchCustomLLM


def random_tokens(config: ModelConfig, length: int, seed: int = 0) -> np.ndarray:  # (1, length)
    length = min(length, config.max_position_embeddings)
    return np.random.default_rng(seed).integers(config.vocab_size, size=(1, length), dtype=np.int32)


def compare_models(
    config: ModelConfig, weights: Weights, model: TorchCustomLLM, ids: np.ndarray, precision: str = "float32"
) -> list[Row]:
    """All comparisons on given tokens (B,T).

    Args:
        weights: the Flax weights.
        model: the PyTorch model, in float32; in float64 precision it is widened here.
    """
    tolerance = TOLERANCES[precision]
    rows = [compare_weights(config, weights, state_dict_arrays(model))]
    if precision == "float64":
        model = model.double()
    ours = jax_forward(config, weights, ids, precision)
    theirs = torch_forward(model, ids)
    routing_bias = np.asarray(weights.routing_bias["decoder_layers"]["mlp"]["routing_bias"])
    choice = compare_experts(ours, theirs, routing_bias, tolerance)
    if not (np.sort(ours.experts) == np.sort(theirs.experts)).all():
        # Perhaps a near tie fell the other way: with the choice held fixed, nothing else may differ.
        theirs = torch_forward(model, ids, experts=ours.experts)
    return [*rows, *compare_hidden(ours, theirs, tolerance), choice, *compare_results(ours, theirs, tolerance)]
