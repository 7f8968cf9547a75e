"""The two frameworks agree within the named tolerances, and a planted fault breaks them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxllm.config import PRESETS
from parity_tests.compare import TOLERANCES, compare_arrays
from parity_tests.forward import random_weights, torch_model
from parity_tests.mutations import MUTATIONS
from parity_tests.report import compare_models, random_tokens

TINY = PRESETS["tiny"]
# several shared experts, more of each latent, no final norm: what tiny does not cover
OTHER = dataclasses.replace(
    TINY, n_shared_experts=2, n_routed_experts=5, num_experts_per_tok=3, compression_ratio=2, final_norm=False
)


@pytest.fixture(scope="module")
def tiny():
    weights = random_weights(TINY)
    return weights, torch_model(TINY, weights), random_tokens(TINY, 500)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_tiny_agrees(tiny, precision):
    weights, _, ids = tiny
    rows = compare_models(TINY, weights, torch_model(TINY, weights), ids, precision)
    assert len(rows) == 1 + 1 + 1 + TINY.num_hidden_layers + 2
    assert [row.what for row in rows if not row.passed] == []


def test_other_shapes_agree():
    weights = random_weights(OTHER, seed=1)
    rows = compare_models(OTHER, weights, torch_model(OTHER, weights), random_tokens(OTHER, 200), "float64")
    assert [row.what for row in rows if not row.passed] == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_fault_is_caught(tiny, name):
    weights, model, ids = tiny
    plant, first_row = MUTATIONS[name]
    with plant(model):
        rows = compare_models(TINY, weights, model, ids)
    breaches = [row.what for row in rows if not row.passed]
    assert breaches[:1] == [first_row]
    # not only on the way: what a user sees is wrong too
    assert {"logits", "loss"} & set(breaches)
    # and the fault is gone again, so that the next one stands alone
    assert all(row.passed for row in compare_models(TINY, weights, model, ids[:, :50]))


def test_two_layers_at_full_width_agree():
    config = dataclasses.replace(PRESETS["customllm-1b"], num_hidden_layers=2)
    weights = random_weights(config)
    rows = compare_models(config, weights, torch_model(config, weights), random_tokens(config, 500))
    assert [row.what for row in rows if not row.passed] == []


@pytest.mark.slow
def test_the_whole_customllm_1b_agrees():
    config = PRESETS["customllm-1b"]
    weights = random_weights(config)
    rows = compare_models(config, weights, torch_model(config, weights), random_tokens(config, 500))
    assert [row.what for row in rows if not row.passed] == []


def test_not_a_number_never_passes():
    values = np.ones((3,))
    assert compare_arrays("x", values + np.arange(3), values + np.arange(3), TOLERANCES["float32"]).passed
    assert not compare_arrays("x", values, np.full((3,), np.nan), TOLERANCES["float32"]).passed
    assert not compare_arrays("x", np.full((3,), np.nan), np.full((3,), np.nan), TOLERANCES["float32"]).passed
