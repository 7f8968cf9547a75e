"""Weights, caches and residuals of bfloat16, which XLA's CPU cannot slice: the same numbers, and no copies."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import TrainConfig
from jaxllm.model import inference
from jaxllm.model.decoder import CustomLLM, split_model
from jaxllm.model.decoding import Sampling, _Choice, _first_token, _more_tokens, generate, prefill
from jaxllm.model.kernels import packed
from jaxllm.model.kernels.packed import pack, unpack
from jaxllm.model.layout import ONE_DEVICE
from jaxllm.model.pullback import with_arguments, without_arguments
from jaxllm.train.computation import Computation
from jaxllm.train.placement import lower_step
from tests.configs import small

SMALL = small(vocab_size=80, n_routed_experts=4, dropout=0.0)
BFLOAT16 = CustomLLM(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 24), 0, SMALL.vocab_size)


def without_packing(model: CustomLLM) -> CustomLLM:
    """The same model on the kernels that it would have on a device with slices of bfloat16."""
    plain = nnx.clone(model)
    for _, node in nnx.iter_graph(plain):
        if hasattr(node, "kernels"):
            node.kernels = dataclasses.replace(model.kernels, packs=False)
    return plain


@pytest.mark.slow
def test_a_model_for_inference_computes_the_same_from_half_of_the_bytes():
    narrow = inference.for_inference(BFLOAT16)
    logits = jax.jit(lambda state, ids: nnx.merge(nnx.graphdef(narrow), state)(ids))
    of_masters = jax.jit(lambda state, ids: nnx.merge(nnx.graphdef(BFLOAT16), state)(ids))
    np.testing.assert_array_equal(logits(nnx.state(narrow), TOKENS), of_masters(nnx.state(BFLOAT16), TOKENS))
    prompts = TOKENS[:, :9].tolist()
    assert generate(narrow, prompts, 20) == generate(BFLOAT16, prompts, 20)
    before, after = (sum(leaf.nbytes for leaf in jax.tree.leaves(split_model(m)[1])) for m in (BFLOAT16, narrow))
    assert after < 0.52 * before


def test_what_computes_in_float32_keeps_its_masters():
    params = split_model(inference.for_inference(BFLOAT16))[1]["decoder_layers"]
    dtypes = {name: str(jax.tree.leaves(part)[0].dtype) for name, part in params["mlp"].items()}
    assert dtypes == {"router": "float32", "routed_experts": "bfloat16", "shared_experts": "bfloat16"}
    assert params["input_norm"]["weight"].dtype == jnp.float32


def test_a_float32_model_is_its_own_model_for_inference():
    model = CustomLLM(SMALL, rngs=nnx.Rngs(0))
    assert inference.for_inference(model) is model


def test_packing_changes_no_number():
    every = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    there, back = pack(every, True), unpack(pack(every, True), True)
    assert (there.dtype, back.dtype) == (jnp.uint16, jnp.bfloat16)
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(back, jnp.uint16), np.arange(2**16))
    assert pack(jnp.ones(3), True).dtype == jnp.float32
    assert pack(every, False) is every


def test_no_packed_array_leaves_the_model():
    """Parameters, caches, records and gradients: all that a caller sees of a bfloat16 model."""
    narrow = inference.for_inference(BFLOAT16)
    graph, params, bias = split_model(BFLOAT16)
    hidden, cache = jax.eval_shape(lambda: prefill(narrow, TOKENS, 4))
    token = TOKENS[:, :1]
    seen = (
        split_model(narrow), hidden, cache,
        jax.eval_shape(lambda cache: narrow.decode(token, token, cache), cache),
        jax.eval_shape(lambda: BFLOAT16.hidden_states(TOKENS, keep_latents=True, keep_trace=True)),
        jax.eval_shape(jax.grad(lambda params: nnx.merge(graph, params, bias)(TOKENS).std()), params),
    )  # fmt: skip
    assert cache.kv.dtype == jnp.bfloat16
    assert not [leaf for leaf in jax.tree.leaves(seen[1:]) if leaf.dtype == jnp.uint16]
    assert {leaf.dtype for leaf in jax.tree.leaves(seen[0][1:])} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_packed_residuals_change_no_gradient(remat):
    """1e-5 of each gradient's largest entry: float32 sums are fused otherwise. A bit of bfloat16 less would be 4e-3."""
    model = CustomLLM(SMALL, dtype=jnp.bfloat16, remat=remat, rngs=nnx.Rngs(0))

    def gradients(model: CustomLLM):
        graph, params, bias = split_model(model)
        return jax.jit(jax.grad(lambda params: nnx.merge(graph, params, bias)(TOKENS).std()))(params)

    for ours, plain in zip(*map(jax.tree.leaves, (gradients(model), gradients(without_packing(model)))), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_a_pullback_is_saved_without_its_arguments_and_each_array_once():
    """What several products read is one array; a layer's weights are not saved; and others can be put back."""

    def layer(weights, x):
        shared = jnp.sin(x)
        return sum(shared * weight for weight in weights)

    weights, x, d = [jnp.full(5, 2, jnp.float32), jnp.full(5, 3, jnp.float32)], jnp.arange(5.0), jnp.arange(5.0)
    residuals = []

    @jax.jit
    def saved_and_restored(weights, x, d):
        _, pullback = jax.vjp(layer, weights, x)
        saved = without_arguments(pullback, weights, must_hold=())
        residuals.extend(saved.arrays)
        return pullback(d), with_arguments(saved, [2 * weight for weight in weights])(d)

    gradients = saved_and_restored(weights, x, d)
    assert len(residuals) == 2  # sin(x) and its derivative
    (d_weights, d_x), (other_d_weights, other_d_x) = gradients
    np.testing.assert_array_equal(d_weights, other_d_weights)
    np.testing.assert_allclose(2 * d_x, other_d_x, rtol=1e-6)


def test_a_layer_that_copies_what_it_writes_in_place_is_refused():
    """Its pullback would not find what the layers after it wrote."""

    def layer(buffer, x):
        return x * jnp.sin(buffer)

    def run(buffer, x):
        _, pullback = jax.vjp(layer, buffer, x)
        without_arguments(pullback, buffer, must_hold=buffer)

    with pytest.raises(RuntimeError, match="does not hold the arrays that its experts write in place"):
        jax.eval_shape(run, jnp.ones(3), jnp.ones(3))


def rewritten_stacks(model: CustomLLM) -> list[str]:
    """The fusions of a training step on the CPU that write one layer's part and convert all layers' to bfloat16."""
    graph, params, bias = split_model(model)
    gradient = jax.jit(jax.grad(lambda params: nnx.merge(graph, params, bias)(TOKENS).std()))
    program = gradient.lower(params).compile().as_text()
    return re.findall(rf"dynamic-update-slice_convert[\w.-]* = bf16\[{SMALL.num_hidden_layers},", program)


def generation(model: CustomLLM, new_tokens: int = 4) -> jax.stages.Compiled:
    """The loop over tokens that continues a row of 32 tokens."""
    graph, params, bias = split_model(model)
    greedy = Sampling(0.0)
    choice = _Choice(greedy.numbers(), jax.random.key(0), jnp.zeros(1, jnp.int32))
    prompt, length = jnp.zeros((1, 32), jnp.int32), jnp.ones(1, jnp.int32)
    start = jax.eval_shape(
        functools.partial(_first_token, graph, greedy.kind, new_tokens), choice, params, bias, prompt, length
    )
    return _more_tokens.lower(graph, greedy.kind, choice, params, bias, new_tokens, start).compile()


def rewritten_caches(model: CustomLLM) -> list[str]:
    """The same for the cache of generation."""
    return re.findall(
        rf"dynamic-update-slice_convert[\w.-]* = bf16\[{SMALL.num_hidden_layers},", generation(model).as_text()
    )


@pytest.mark.parametrize("rewritten", [pytest.param(rewritten_stacks, marks=pytest.mark.slow), rewritten_caches])
def test_no_layer_rewrites_what_the_others_wrote(rewritten):
    assert not rewritten(BFLOAT16)
    if packed.NEEDED:
        assert rewritten(without_packing(BFLOAT16))


def test_decoding_copies_neither_weights_nor_cache(monkeypatch):
    """The loop over tokens reads both in place: its temporaries are far smaller than the layers' or the table's."""
    config = dataclasses.replace(
        SMALL, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=6, vocab_size=20_000
    )
    model = nnx.eval_shape(lambda: inference.for_inference(CustomLLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    weights = 2 * 256 * 20_000
    assert sum(leaf.size * 2 for leaf in jax.tree.leaves(split_model(model)[1]["decoder_layers"])) > weights

    def temporaries(new_tokens: int) -> int:
        return generation(model, new_tokens).memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.5 * weights
    if packed.NEEDED:
        monkeypatch.setattr(packed, "NEEDED", False)  # of `read` alone: the others have it as their default
        assert temporaries(5) > weights


@pytest.mark.slow
def test_a_training_step_rewrites_no_array():
    config = TrainConfig.from_options(precision="bfloat16", optimizer="muon")  # Muon, and a loss in two chunks
    program = lower_step(Computation.of(config), ONE_DEVICE).compile().as_text()
    assert not re.findall(r"dynamic-update-slice[\w.-]*convert[\w.-]* = bf16", program)
