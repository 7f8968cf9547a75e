"""The model with a GPU's kernels, interpreted on the CPU: they compute what the kernels of any device compute."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl

from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.model.decoder import CustomLLM, split_model
from jaxllm.model.kernels import ANY, CUDA, choose_kernels, grouped_loop, grouped_triton, grouped_whole
from jaxllm.model.kernels.interface import ExpertKernels, ExpertRows, Saved
from jaxllm.model.kernels.self_check import check_kernels
from jaxllm.run.self_check import failures
from jaxllm.train.loss import summed_cross_entropy
from tests.configs import small

SMALL = small(vocab_size=64, moe_intermediate_size=48, n_shared_experts=2, max_position_embeddings=32)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run in Pallas' interpreter, on arrays whose contents at the start are not numbers."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    nowhere: dict[str, Any] = {
        "new_saved": lambda *args: jnp.full(args[:3], jnp.nan, args[3]),
        "new_gradient": lambda weight: jnp.full_like(weight, jnp.nan),
    }
    for module in (grouped_triton, grouped_whole):
        monkeypatch.setattr(module, "KERNELS", dataclasses.replace(module.KERNELS, **nowhere))


@pytest.mark.parametrize(
    "sizes",
    [(0, 130, 1, 300), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((431, 0, 0, 0), (0, 0, 128, 256)))],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_triton_kernels_equal_the_loops(interpreted, sizes, dtype):
    """Both passes, by the second of three layers, on tokens in any order. The kernels accumulate in float32."""
    keys = jax.random.split(jax.random.key(0), 7)
    M, N = sum(sizes), sum(sizes) // 2
    x, d_out = (jax.random.normal(key, (N, 32)).astype(dtype) for key in keys[:2])
    row_weights = jax.random.uniform(keys[2], (M, 1), jnp.float32)
    tokens = jax.random.randint(keys[6], (M,), 0, N)
    shapes = ((4, 32, 48), (4, 32, 48), (4, 48, 32))
    weights = [jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys[3:6], shapes, strict=True)]
    counts, second = jnp.asarray(sizes), jnp.asarray(1)

    def results(grouped: ExpertKernels) -> list[np.ndarray]:
        def pad(a):
            return jnp.pad(a, ((0, grouped.padding(M)), *[(0, 0)] * (a.ndim - 1)))

        def rows(experts, offset) -> ExpertRows:
            read = tuple(grouped.prepared(weight, x.dtype) for weight in experts)
            return ExpertRows(x, pad(tokens), pad(row_weights), counts, read, offset)

        of_layer = rows([jnp.concatenate([a + 1, a, a - 1]) for a in weights], 4 * second)
        at_start = 0 if grouped == grouped_loop.KERNELS else jnp.nan  # the loops leave the zeros of empty groups
        totals = tuple(jnp.ones((12, *shape[1:])).at[4:8].set(at_start) for shape in shapes)
        room = Saved(jnp.zeros_like(grouped.new_saved(3, M, 96, x.dtype)), second)
        out, saved = grouped.ffn(of_layer, room)
        out_alone, _ = grouped.ffn(rows(weights, 0), None)
        d_rows, d_row_weights, totals = grouped.ffn_gradients(of_layer, d_out, Saved(saved, second), totals)
        made = [out[:M], out_alone[:M], d_rows[:M], d_row_weights[:M], *totals]
        made += [saved[layer, :M] for layer in (1, 0, 2)]
        return [np.asarray(a, np.float64) for a in made]

    tolerance = 1e-5 if dtype == "float32" else 1e-2
    wanted = results(grouped_loop.KERNELS)
    of_layer, alone, *_, first_layer, last_layer = wanted
    np.testing.assert_array_equal(of_layer, alone)
    assert not first_layer.any()
    assert not last_layer.any()
    for ours, theirs in zip(results(grouped_triton.KERNELS), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, targets="experts")], ids=["trained", "adapters"])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_self_check_passes(interpreted, dtype, lora):
    config = dataclasses.replace(SMALL, n_shared_experts=1)
    kernels = choose_kernels(config, dtype, CUDA, lora=lora)
    checks = check_kernels(kernels, config, jnp.dtype(dtype), ["routed", "shared"], lora)
    assert failures(checks) == {}
    assert {check.kernel for check in checks} == {"product", "routed", "shared"}


def loss_and_gradients(
    config: ModelConfig, platform: str, remat: bool, auxiliary: bool = False
) -> tuple[jax.Array, dict]:
    model = CustomLLM(config, remat=remat, rngs=nnx.Rngs(0), platform=platform)
    graph, params, bias = split_model(model)
    params = jax.tree.map(lambda weight: 5 * weight if weight.ndim > 1 else weight, params)
    ids = jax.random.randint(jax.random.key(1), (2, 20), 0, 64)

    def loss(params):
        model = nnx.merge(graph, params, bias)
        last, record = model.hidden_states(ids)
        if auxiliary:
            return record.balance_loss.sum() + record.z_loss.sum()
        hidden = model.apply_final_norm(last)
        return summed_cross_entropy(hidden.reshape(-1, 32), *model.head(), ids.reshape(-1))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_step_s_gradients(interpreted, remat):
    """float32: 3e-5 of each gradient's largest entry, since sums are in another order."""
    (wanted, wanted_gradients), (made, gradients) = (
        loss_and_gradients(SMALL, platform, remat) for platform in (ANY, CUDA)
    )
    np.testing.assert_allclose(made, wanted, rtol=1e-6)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        assert np.abs(theirs).max() > 0, path
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * np.abs(theirs).max(), err_msg=str(path))


@pytest.mark.slow
def test_the_gradients_of_the_auxiliary_losses_alone(interpreted):
    """They do not depend on the last layer's output, and must find what the layers saved all the same."""
    (wanted, wanted_gradients), (made, gradients) = (
        loss_and_gradients(SMALL, platform, remat=True, auxiliary=True) for platform in (ANY, CUDA)
    )
    np.testing.assert_allclose(made, wanted, rtol=1e-6)
    for path in (("input_norm", "weight"), ("mlp", "routed_experts", "up_proj", "weight")):
        ours, theirs = (
            functools.reduce(dict.__getitem__, path, tree["decoder_layers"]) for tree in (gradients, wanted_gradients)
        )
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_a_layer_that_writes_another_s_part_is_seen(interpreted, monkeypatch):
    write = grouped_triton.weight_gradients

    def first_layer_alone(rows, d_out, group_sizes, totals, offset=0):
        return write(rows, d_out, group_sizes, totals, jnp.zeros_like(offset))

    monkeypatch.setattr(grouped_triton, "weight_gradients", first_layer_alone)
    _, gradients = loss_and_gradients(SMALL, CUDA, False)
    assert bool(jnp.isnan(gradients["decoder_layers"]["mlp"]["routed_experts"]["up_proj"]["weight"][1:]).all())


def test_decoding_reads_its_layer_s_experts(interpreted):
    """One token after a prompt: the logits of the whole sequence's last position."""
    config = dataclasses.replace(SMALL, num_hidden_layers=2)
    model = CustomLLM(config, rngs=nnx.Rngs(0), platform=CUDA)
    ids = jax.random.randint(jax.random.key(1), (1, 9), 0, 64)

    @nnx.jit
    def both(model, ids):
        latents = model.hidden_states(ids[:, :8], keep_latents=True)[1].latents
        cache = jax.tree.map(
            lambda slots: jnp.pad(slots, [(0, 0), (0, 0), (0, 1)] + [(0, 0)] * (slots.ndim - 3)), latents
        )
        return model.decode(ids[:, 8:], jnp.full((1, 1), 8), cache)[0][:, 0], model(ids)[:, 8]

    made, wanted = both(model, ids)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.slow
def test_decoding_refuses_a_gradient():
    model = CustomLLM(dataclasses.replace(SMALL, num_hidden_layers=1), rngs=nnx.Rngs(0), platform=ANY)
    token, position = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    cache = jax.tree.map(jnp.zeros_like, model.hidden_states(token, keep_latents=True)[1].latents)

    def loss(model):
        return model.decode(token, position, cache)[0].sum()

    with pytest.raises(ValueError, match="decoding has no gradient"):
        nnx.grad(loss)(model)
