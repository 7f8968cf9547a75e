"""Muon: the iteration, which parameters it updates, and the update on one device and on several."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from jaxllm.config import PRESETS
from jaxllm.model.decoder import abstract_model, model_facts
from jaxllm.train.muon import RMS, newton_schulz
from jaxllm.train.optim import OptimizerState, StepNumbers, clip_gradients, learning_rate, update
from tests.test_parallel import CONFIG, TOLERANCE, differences, run, run_steps

MUON = CONFIG.with_options(optimizer="muon", learning_rate=1e-2, warmup_steps=0)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32), (3, 4, 24, 16)])
def test_newton_schulz_is_nearly_orthogonal_and_keeps_the_singular_vectors(shape):
    x = random(*shape)
    made = np.asarray(newton_schulz(jnp.asarray(x), jnp.float32))
    values = np.linalg.svd(made, compute_uv=False)
    assert 0.6 < values.min() <= values.max() < 1.3
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    outside = u.mT @ made @ vt.mT
    outside = outside - outside * np.eye(outside.shape[-1])
    assert np.abs(outside).max() < 1e-4
    np.testing.assert_allclose(newton_schulz(jnp.asarray(x.mT), jnp.float32), made.mT, atol=1e-5)


def test_a_zero_matrix_stays_zero():
    assert not np.asarray(newton_schulz(jnp.zeros((2, 8, 4)), jnp.float32)).any()


@pytest.mark.parametrize("name", ["tiny", "tiny-deepseek"])
def test_the_matrices_of_the_layers_are_muon_s(name):
    facts = flatten_dict(model_facts(PRESETS[name])[0])
    others = {path[-2] for path, known in facts.items() if not known.is_hidden_matrix}
    assert not {name for name in others if name.endswith(("proj", "_d", "_u")) or name.startswith("rope")}
    assert {"router", "token_embeddings", "lm_head", "input_norm"} <= others
    matrices = {path[-2] for path, known in facts.items() if known.is_hidden_matrix}
    assert {"kv_proj_d", "k_proj_u", "rope_q", "o_proj", "gate_proj", "down_proj"} <= matrices


@functools.cache
def compiled_update(config):
    model, numbers = nnx.merge(*abstract_model(config.model)), StepNumbers.of(config.optim, config.schedule)

    @jax.jit
    def clipped(grads, state: OptimizerState, params, finite):
        grads = clip_gradients(grads, jnp.float32(1), numbers.max_grad_norm)
        rate = learning_rate(numbers, state.count)
        return update(config.optim, model, grads, state, params, rate, finite)

    return clipped


def one_update(config, scale: float = 1.0, finite: bool = True):
    params = jax.tree.map(lambda leaf: jnp.asarray(random(*leaf.shape)), abstract_model(config.model)[1])
    grads = jax.tree.map(lambda leaf: jnp.asarray(scale * random(*leaf.shape, seed=1)), params)
    state = OptimizerState.zeros(config.model, config.optim, params)
    return params, compiled_update(config)(grads, state, params, jnp.bool(finite))


def test_an_update_has_the_size_of_adamw_s_whatever_the_gradient():
    config = MUON.with_options(weight_decay=0.0)
    for scale in (1e-3, 1e3):
        params, (new, _) = one_update(config, scale)
        change = jax.tree.map(jnp.subtract, params, new)["decoder_layers"]["mlp"]["routed_experts"]["up_proj"]["weight"]
        rms = np.sqrt(np.mean(np.square(change), axis=(-2, -1))) / config.optim.learning_rate
        np.testing.assert_allclose(rms, RMS, rtol=0.2)


def test_there_is_one_moment_for_a_matrix_and_two_for_the_rest():
    params, (_, state) = one_update(MUON)
    mu, nu, facts = (flatten_dict(tree) for tree in (state.mu, state.nu, model_facts(MUON.model)[0]))
    assert mu.keys() == flatten_dict(params).keys()
    assert nu.keys() == {path for path, known in facts.items() if not known.is_hidden_matrix}


def test_embeddings_are_updated_as_by_adamw():
    _, (muon, _) = one_update(MUON)
    _, (adamw, _) = one_update(MUON.with_options(optimizer="adamw"))
    for name in ("token_embeddings", "lm_head"):
        jax.tree.map(np.testing.assert_array_equal, muon[name], adamw[name])


def test_an_update_that_is_not_finite_changes_nothing():
    params, (new, state) = one_update(MUON, np.inf, finite=False)
    jax.tree.map(np.testing.assert_array_equal, new, params)
    jax.tree.map(np.testing.assert_array_equal, state, OptimizerState.zeros(MUON.model, MUON.optim, params))


@pytest.mark.slow  # tests/test_parallel.py compares Muon on the DeepSeek family
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,expert=2", "fsdp=8"])
def test_every_mesh_computes_what_one_device_computes(mesh):
    wanted, wanted_metrics = run_steps(optimizer="muon")
    state, metrics = run_steps(optimizer="muon", mesh=mesh)
    assert_same(state, metrics, wanted, wanted_metrics)


@pytest.mark.slow
def test_pmap_computes_what_one_device_computes():
    assert_same(*run(optimizer="muon", parallel="pmap")[:2], *run_steps(optimizer="muon"))


def assert_same(state, metrics, wanted, wanted_metrics) -> None:
    np.testing.assert_allclose(metrics, wanted_metrics, rtol=2e-6)
    worst = max(differences(state, wanted).items(), key=lambda item: item[1])
    assert worst[1] < TOLERANCE, worst
