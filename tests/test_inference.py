"""Weights, caches and residuals of bfloat16, packed where XLA's CPU cannot slice them: the same numbers."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import ModelConfig, TrainConfig
from jaxllm.generate import generate, prefill
from jaxllm.model import inference
from jaxllm.model.decoder import CustomLLM, split_model
from jaxllm.model.kernels.packed import pack, packing_residuals, unpack
from jaxllm.model.layout import ONE_DEVICE
from jaxllm.train.placement import lower_step
from jaxllm.train.step import model_graph

SMALL = ModelConfig(
    vocab_size=80,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    moe_intermediate_size=24,
    n_routed_experts=4,
    max_position_embeddings=64,
    dropout=0.0,
)
BFLOAT16 = CustomLLM(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 24), 0, SMALL.vocab_size)


def without_packing(model: CustomLLM) -> CustomLLM:
    """The same model on the kernels that it would have on a device with slices of bfloat16."""
    plain = nnx.clone(model)
    plain.kernels = dataclasses.replace(model.kernels, packs=False)
    return plain


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
    assert dtypes == {"router": "float32", "routed_experts": "uint16", "shared_experts": "uint16"}
    assert params["input_norm"]["weight"].dtype == jnp.float32


def test_a_float32_model_is_its_own_model_for_inference():
    model = CustomLLM(SMALL, rngs=nnx.Rngs(0))
    assert inference.for_inference(model) is model


def test_packing_changes_no_number():
    every = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(unpack(pack(every)), jnp.uint16), np.arange(2**16))
    assert pack(jnp.ones(3)).dtype == jnp.float32


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_packed_residuals_change_no_gradient(remat):
    """1e-5 of each gradient's largest entry: float32 sums are fused otherwise. A bit of bfloat16 less would be 4e-3."""
    model = CustomLLM(SMALL, dtype=jnp.bfloat16, remat=remat, rngs=nnx.Rngs(0))

    def gradients(model: CustomLLM):
        graph, params, bias = split_model(model)
        return jax.jit(jax.grad(lambda params: nnx.merge(graph, params, bias)(TOKENS).std()))(params)

    for ours, plain in zip(*map(jax.tree.leaves, (gradients(model), gradients(without_packing(model)))), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_what_several_products_read_is_kept_once():
    def layer(x, weights):
        shared = jnp.sin(x).astype(jnp.bfloat16)
        return x + sum(shared * weight for weight in weights).astype(x.dtype), None

    def loss(weights, layer):
        return jax.lax.scan(layer, jnp.ones(5), weights)[0].sum()

    def stacks(layer) -> list:
        weights = [jnp.ones((7, 5), jnp.bfloat16) for _ in range(3)]
        program = jax.make_jaxpr(jax.grad(loss), static_argnums=1)(weights, layer)
        forward = next(equation for equation in program.eqns if equation.primitive.name == "scan")
        return [out.aval.dtype for out in forward.outvars if out.aval.shape == (7, 5)]

    assert stacks(packing_residuals(layer)).count(jnp.uint16) == 1 + 3  # what is shared, and the weights


def rewritten_stacks(model: CustomLLM) -> list[str]:
    """The fusions of a training step on the CPU that write one layer's part and convert all layers' to bfloat16."""
    graph, params, bias = split_model(model)
    gradient = jax.jit(jax.grad(lambda params: nnx.merge(graph, params, bias)(TOKENS).std()))
    program = gradient.lower(params).compile().as_text()
    return re.findall(rf"dynamic-update-slice[\w.-]* = bf16\[{SMALL.num_hidden_layers},", program)


def rewritten_caches(model: CustomLLM) -> list[str]:
    """The same for the cache of a decoding step."""
    graph, params, bias = split_model(model)
    token = TOKENS[:1, :1]  # of one row: several are written by a scatter
    _, cache = jax.jit(lambda params: prefill(nnx.merge(graph, params, bias), TOKENS[:1], 8))(params)
    step = jax.jit(lambda params, cache: nnx.merge(graph, params, bias).decode(token, token, cache))
    program = step.lower(params, cache).compile().as_text()
    return re.findall(rf"dynamic-update-slice[\w.-]* = bf16\[{SMALL.num_hidden_layers},", program)


@pytest.mark.parametrize("rewritten", [rewritten_stacks, rewritten_caches])
def test_no_layer_rewrites_what_the_others_wrote(rewritten):
    assert not rewritten(BFLOAT16)
    if jax.__version_info__ < (0, 12):
        assert rewritten(without_packing(BFLOAT16))


@pytest.mark.slow
def test_a_training_step_rewrites_no_array():
    config = TrainConfig.from_options(precision="bfloat16", optimizer="muon")  # Muon, and a loss in two chunks
    program = lower_step(config, model_graph(config), ONE_DEVICE).compile().as_text()
    assert not re.findall(r"dynamic-update-slice[\w.-]*convert[\w.-]* = bf16", program)
