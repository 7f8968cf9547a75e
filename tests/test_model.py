"""The Flax model: sizes, causality, padding, precision, remat."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from jaxllm import PRESETS, CustomLLM
from jaxllm.model.decoder import abstract_model, count_parameters, split_model
from jaxllm.train.loss import count_targets
from jaxllm.train.step import summed_loss
from tests.configs import SMALL


def small_model(dtype=jnp.float32, **changes) -> CustomLLM:
    """A model with weights so large that attention is far from uniform; drawn by NumPy, so that nothing is compiled."""
    graph, params, bias = abstract_model(dataclasses.replace(SMALL, **changes), dtype=dtype)
    rng = np.random.default_rng(0)

    def drawn(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        around = 5 if "norm" in jax.tree_util.keystr(path) else 0
        return jnp.asarray(around + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(graph, *jax.tree_util.tree_map_with_path(drawn, (params, bias)))


@jax.jit
def logits_of(model: CustomLLM, *args) -> jax.Array:
    return model(*args)


def tokens(length: int, batch: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(3), (batch, length), 0, SMALL.vocab_size)


@pytest.mark.parametrize(("name", "count"), [("customllm-1b", 1_075_060_736), ("customllm-768", 793_921_536)])
def test_presets_have_exactly_their_parameters(name, count):
    assert count_parameters(abstract_model(PRESETS[name])[1]) == count


def test_tiny_is_tiny():
    assert 5e6 < count_parameters(abstract_model(PRESETS["tiny"])[1]) < 15e6


def test_logits_are_float32_in_every_precision():
    for dtype in (jnp.float32, jnp.bfloat16):
        logits = jax.eval_shape(small_model(dtype), tokens(9))
        assert logits.shape == (2, 9, SMALL.vocab_size)
        assert logits.dtype == jnp.float32


def test_masters_stay_float32_in_bfloat16():
    _, params, bias = abstract_model(SMALL, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, bias))} == {jnp.dtype(jnp.float32)}


def test_changing_a_token_changes_no_logit_before_it():
    """With the routing held fixed not one bit moves; with it free, rounding may (float64: 1e-12)."""
    with jax.enable_x64(True):
        model = small_model(jnp.float64)
        run = jax.jit(lambda ids, experts: (lambda x, r: (model.logits(x), r.trace.routing.experts))(
            *model.hidden_states(ids, experts=experts, keep_trace=True)
        ))  # fmt: skip
        ids = tokens(40)
        before, experts = run(ids, None)
        for t in (1, 17, 39):
            changed = ids.at[:, t].set((ids[:, t] + 1) % SMALL.vocab_size)
            free, _ = run(changed, None)
            held, _ = run(changed, experts)
            scale = jnp.abs(before).max()
            assert jnp.abs(free[:, :t] - before[:, :t]).max() <= 1e-12 * scale
            np.testing.assert_array_equal(held[:, :t], run(ids, experts)[0][:, :t])
            assert jnp.abs(free[:, t:] - before[:, t:]).max() > 1e-3 * scale  # the token itself matters


@pytest.mark.slow
def test_uniform_random_tokens_cannot_be_predicted():
    """An answer that leaks would push the loss below log V; fresh weights leave it there."""
    ids = jax.random.randint(jax.random.key(9), (32, 64), 0, SMALL.vocab_size)

    @jax.jit
    def loss():
        model = CustomLLM(SMALL, rngs=nnx.Rngs(0))
        return summed_loss(model, model.hidden_states(ids)[0], ids) / count_targets(ids)

    assert float(loss()) == pytest.approx(np.log(SMALL.vocab_size), abs=0.02)


def test_padding_changes_nothing_for_real_tokens():
    model = small_model()
    ids = tokens(20)
    real = logits_of(model, ids)
    for pads in (np.zeros((2, 0)), np.ones((2, 7))):
        padded = jnp.concatenate([jnp.zeros((2, pads.shape[1]), ids.dtype), ids], axis=1)
        mask = jnp.concatenate([jnp.zeros(pads.shape), jnp.ones((2, 20))], axis=1)
        np.testing.assert_allclose(logits_of(model, padded, mask)[:, pads.shape[1] :], real, rtol=2e-4, atol=2e-4)
    assert np.isfinite(logits_of(model, padded, mask)).all()  # padded rows too


@pytest.mark.slow  # tests/test_parallel.py compares steps with and without it
def test_remat_changes_no_gradient():
    model = small_model()
    graph, params, bias = split_model(model)
    rematted, _, _ = abstract_model(SMALL, remat=True)
    ids = tokens(30)

    def grads(graph):
        def loss(params):
            model = nnx.merge(graph, params, bias)
            return summed_loss(model, model.hidden_states(ids)[0], ids)

        return jax.jit(jax.grad(loss))(params)

    plain, other = grads(graph), grads(rematted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)


def test_compile_time_does_not_grow_with_depth():
    """The layers are one loop: the program of 12 layers has as many operations as that of 3."""

    def operations(layers: int) -> int:
        graph, params, bias = abstract_model(dataclasses.replace(SMALL, num_hidden_layers=layers))
        lowered = jax.jit(lambda p, b, ids: nnx.merge(graph, p, b)(ids)).lower(
            params, bias, jax.ShapeDtypeStruct((2, 16), jnp.int32)
        )
        return len(lowered.as_text().splitlines())

    assert operations(12) == operations(3)


def test_dropout_needs_a_key_and_uses_it():
    model = small_model(dropout=0.5)
    ids = tokens(10)
    still = logits_of(model, ids)
    np.testing.assert_array_equal(still, logits_of(model, ids))
    dropped = jax.jit(lambda key: model(ids, rngs=nnx.Rngs(dropout=key)))
    one, two = (dropped(jax.random.key(seed)) for seed in (1, 2))
    assert not np.allclose(one, still)
    assert not np.allclose(one, two)


@pytest.mark.parametrize("token", [-1, SMALL.vocab_size, 10**6])
def test_a_token_without_a_row_is_refused_outside_jit(token):
    """JAX reads the nearest row, or one from the end."""
    with pytest.raises(ValueError, match=f"the token {token}: .*vocab_size - 1 = {SMALL.vocab_size - 1}"):
        small_model()(tokens(9).at[1, 4].set(token))


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((1, SMALL.max_position_embeddings + 1), None, "max_position_embeddings = 64"),
        ((9,), None, r"input_ids has the shape \(9,\)"),
        ((2, 9), (2, 8), r"attention_mask has the shape \(2, 8\).*\(2, 9\)"),
        ((2, 9), (1, 9), r"attention_mask has the shape \(1, 9\).*\(2, 9\)"),
    ],
)
@pytest.mark.parametrize("under", [lambda f: f, jax.jit, jax.make_jaxpr], ids=["eager", "jit", "jaxpr"])
def test_shapes_are_checked_everywhere(shape, mask, message, under):
    graph, *state = split_model(small_model())
    ids, mask = jnp.zeros(shape, jnp.int32), None if mask is None else jnp.ones(mask, jnp.int32)
    with pytest.raises(ValueError, match=message):
        under(lambda state, ids, mask: nnx.merge(graph, *state)(ids, mask))(state, ids, mask)


def test_the_table_s_last_position_and_token_are_accepted():
    full = jnp.full((1, SMALL.max_position_embeddings), SMALL.vocab_size - 1)
    assert bool(jnp.isfinite(small_model()(full)).all())


@pytest.mark.parametrize("made", [copy.deepcopy, nnx.clone, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_is_apart(made):
    model = small_model()
    other = made(model)
    wanted = logits_of(model, tokens(9))
    np.testing.assert_array_equal(logits_of(other, tokens(9)), wanted)
    other.lm_head.weight[...] = jnp.zeros_like(other.lm_head.weight[...])
    np.testing.assert_array_equal(logits_of(model, tokens(9)), wanted)


def test_tabulate_reads_every_layer():
    model = small_model()
    table = nnx.tabulate(model, tokens(9), console_kwargs={"width": 400})
    for path in ("decoder_layers/self_attn/o_proj", "decoder_layers/mlp/routed_ffn"):
        assert path in table
    counted = count_parameters(split_model(model)[1]) + SMALL.num_hidden_layers * SMALL.n_routed_experts
    assert f"Total Parameters: {counted:,}" in table  # it counts the routing bias too
    assert bool(jnp.isfinite(logits_of(model, tokens(9))).all())


def exported(*constraints: str, platform: str | None = None, dtype=jnp.float32) -> export.Exported:
    """A model for any batch and time."""
    # Triton's tiles need a multiple of 16
    config = dataclasses.replace(SMALL, moe_intermediate_size=32)
    graph, *state = abstract_model(config, dtype=dtype, platform=platform)
    ids = jax.ShapeDtypeStruct(export.symbolic_shape("b, t", constraints=constraints), jnp.int32)
    program = jax.jit(lambda state, *args: nnx.merge(graph, *state)(*args))
    layouts = export.DisabledSafetyCheck.custom_call("LayoutConstraint")  # of a CPU's bfloat16 products
    return export.export(program, disabled_checks=[layouts])(state, ids, ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [
        (jnp.float32, [(1, 1), (3, 9), (2, SMALL.max_position_embeddings)]),
        pytest.param(jnp.bfloat16, [(1, 1), (3, 9), (2, SMALL.max_position_embeddings)], marks=pytest.mark.slow),
    ],
    ids=["float32", "bfloat16"],
)
def test_the_exported_program_runs_for_any_batch_and_time(dtype, shapes):
    model = small_model(dtype, moe_intermediate_size=32)
    program = exported(f"t <= {SMALL.max_position_embeddings}", dtype=dtype)
    for batch, length in shapes:
        mask = (jnp.arange(length) >= jnp.arange(batch)[:, None]).astype(jnp.int32)
        logits = program.call([*split_model(model)[1:]], tokens(length, batch), mask)
        tolerance = 1e-5 if dtype == jnp.float32 else 5e-2  # other blocks of rows round otherwise
        np.testing.assert_allclose(logits, logits_of(model, tokens(length, batch), mask), atol=tolerance)


def test_an_export_without_a_limit_of_time_is_refused():
    with pytest.raises(ValueError, match=r"constraints=\['t <= 64'\]"):
        exported()


def test_an_export_of_the_triton_kernels_is_refused():
    with pytest.raises(ValueError, match="platform='any'"):
        exported(f"t <= {SMALL.max_position_embeddings}", platform="cuda")
