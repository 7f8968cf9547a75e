"""Routing and the experts: no token is dropped, whatever the imbalance, and the gradients are those of a plain loop."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxllm.config import ModelConfig
from jaxllm.model import moe
from jaxllm.model.kernels import grouped_loop as grouped_loop
from jaxllm.model.kernels.expert_ffn import expert_ffn

SMALL = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, moe_intermediate_size=24)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@jax.jit
def oracle_and_gradients(cotangent, rows, row_weights, gate, up, down, expert):
    """All rows through one expert after another, of which each row keeps its own `expert`'s; plain autodiff."""

    def function(rows, row_weights, gate, up, down):
        out = jnp.zeros_like(rows)
        for e in range(len(gate)):
            made = (jax.nn.silu(rows @ gate[e]) * (rows @ up[e])) @ down[e]
            out = jnp.where((expert == e)[:, None], made, out)
        return row_weights[:, None] * out

    out, pullback = jax.vjp(function, rows, row_weights, gate, up, down)
    return out, pullback(cotangent)


ROWS = 2400


@jax.jit
def expert_ffn_and_gradients(cotangent, rows, row_weights, gate, up, down, group_sizes):
    def function(rows, row_weights, *weights):
        return expert_ffn(grouped_loop, rows, row_weights, weights, group_sizes)

    out, pullback = jax.vjp(function, rows, row_weights, gate, up, down)
    return out, pullback(cotangent)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(st.sampled_from([0, 1, 16, 17, 33, 256, 257, 300, 1024, 1025]), min_size=3, max_size=3)
    .filter(lambda sizes: sum(sizes) <= ROWS)
    .flatmap(lambda sizes: st.permutations([*sizes, ROWS - sum(sizes)])),
    st.integers(0, 2**31),
)
def test_expert_ffn_equals_a_loop_over_experts(sizes, seed):
    keys = jax.random.split(jax.random.key(seed), 6)
    rows, cotangent = (jax.random.normal(key, (ROWS, 8), jnp.float64) for key in keys[:2])
    weights = [jax.random.uniform(keys[5], (ROWS,))]
    weights += [jax.random.normal(keys[2], (4, 8, 6)), jax.random.normal(keys[3], (4, 8, 6))]
    weights.append(jax.random.normal(keys[4], (4, 6, 8)))

    out, grads = expert_ffn_and_gradients(cotangent, rows, *weights, jnp.asarray(sizes))
    wanted, wanted_grads = oracle_and_gradients(cotangent, rows, *weights, np.repeat(np.arange(4), sizes))
    np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11 * np.abs(theirs).max())


def test_group_sizes_reach_every_kind_of_block():
    """The sizes that hypothesis draws from fill a block, spill over one, and take several of the largest."""
    assert {16, 256, 1024} <= set(grouped_loop.BLOCK_ROWS)
    assert grouped_loop.BLOCK_ROWS[-1] == 1024


def test_every_group_has_a_block_that_holds_it():
    """For any number of rows: a block holds the group, and does not run over the padding."""
    for rows, groups in itertools.product([*range(1, 1100), 4096, 10_000], (1, 2, 7, 64)):
        padded = rows + grouped_loop.padding(rows)
        sizes = grouped_loop.block_sizes(padded, groups)
        for group in {1, rows // 2 + 1, rows}:
            last_block = min(group, grouped_loop.BLOCK_ROWS[-1])
            size = next(b for b in sizes if b >= last_block)
            assert rows - last_block + size <= padded


def test_a_single_row_is_not_padded_in_decoding():
    """A batch of one token with two experts: two groups of one row, each in a block of one."""
    assert grouped_loop.block_sizes(2 + grouped_loop.padding(2), 7) == (1, 2)


def loop_over_tokens(layer: moe.DeepSeekMoE, x: np.ndarray) -> np.ndarray:
    """The definition, token by token, in numpy."""
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    bias, router = np.asarray(layer.routing_bias[...]), np.asarray(layer.router.weight[...])

    def weights_of(stack):
        return [np.asarray(p.weight[...]) for p in (stack.gate_proj, stack.up_proj, stack.down_proj)]

    routed, shared = weights_of(layer.routed_experts), weights_of(layer.shared_experts)

    def expert(stack, e, token):
        gate, up, down = (weight[e] for weight in stack)
        pre = token @ gate
        return (pre / (1 + np.exp(-pre)) * (token @ up)) @ down

    out = np.zeros_like(flat)
    for i, token in enumerate(flat):
        scores = 1 / (1 + np.exp(-(token @ router)))
        chosen = sorted(range(len(bias)), key=lambda e: (-(scores[e] + bias[e]), e))[: layer.config.num_experts_per_tok]
        total = scores[chosen].sum() + 1e-20
        out[i] = sum(scores[e] / total * expert(routed, e, token) for e in chosen)
        out[i] += sum(expert(shared, j, token) for j in range(layer.config.n_shared_experts))
    return out.reshape(x.shape)


@pytest.mark.parametrize("crowded", [False, True], ids=["random routing", "all tokens on one pair"])
def test_no_token_is_dropped(crowded):
    layer = nnx.jit(lambda: moe.DeepSeekMoE(SMALL, dtype=jnp.float64, rngs=nnx.Rngs(0)))()
    bias = np.random.default_rng(0).normal(size=7) * 0.05
    if crowded:
        bias[[2, 5]] += 10
    layer.routing_bias[...] = jnp.asarray(bias)
    x = jax.random.normal(jax.random.key(1), (3, 100, 32), jnp.float64)
    out, routing, _ = nnx.jit(lambda layer, x: layer(x))(layer, x)
    if crowded:
        assert set(np.unique(routing.experts)) == {2, 5}
    np.testing.assert_allclose(out, loop_over_tokens(layer, np.asarray(x)), rtol=1e-10, atol=1e-14)


def test_ties_choose_the_lowest_index():
    routing = moe.route(jnp.zeros((5, 4)), jnp.zeros((4, 6)), jnp.zeros((6,)), 2)
    assert (np.asarray(routing.experts) == [0, 1]).all()


def test_the_bias_steers_the_choice_but_not_the_gates():
    x = jax.random.normal(jax.random.key(0), (50, 8))
    weight = jax.random.normal(jax.random.key(1), (8, 5))
    bias = jnp.asarray([0.0, 5.0, 0.0, 0.0, 0.0])
    steered = moe.route(x, weight, bias, 2)
    assert (np.asarray(steered.experts)[:, 0] == 1).all()
    same_choice = moe.route(x, weight, jnp.zeros(5), 2, experts=steered.experts)
    np.testing.assert_array_equal(steered.gates, same_choice.gates)
    np.testing.assert_allclose(steered.gates.sum(axis=-1), 1, rtol=1e-12)


def test_dispatch_and_combine_are_inverse_and_their_gradients_are_gathers():
    x = jax.random.normal(jax.random.key(0), (40, 6))
    experts = jax.random.randint(jax.random.key(1), (40, 3), 0, 5)
    plan = moe.plan_dispatch(experts, 5)
    gates = jax.random.uniform(jax.random.key(2), (40, 3))
    assert (np.diff(np.asarray(experts).reshape(-1)[plan.order]) >= 0).all()
    assert plan.group_sizes.sum() == 120

    def through(x, gates):  # each expert scales its rows by another factor, so that no two slots are alike
        factor = 1 + experts.reshape(-1)[plan.order]
        return moe.combine(moe.dispatch(x, plan) ** 2 * (factor * moe.dispatch_gates(gates, plan))[:, None], plan)

    def plain(x, gates):
        return x**2 * (gates * (1 + experts)).sum(axis=-1, keepdims=True)

    cotangent = jax.random.normal(jax.random.key(3), x.shape)

    def value_and_gradients(function):
        out, pullback = jax.vjp(function, x, gates)
        return out, *pullback(cotangent)

    for ours, theirs in zip(
        *(jax.jit(functools.partial(value_and_gradients, function))() for function in (through, plain)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    backward = jax.make_jaxpr(lambda *a: jax.vjp(through, x, gates)[1](*a))(cotangent)
    assert "scatter" not in str(backward)


def test_routing_bias_moves_against_the_crowd():
    counts = jnp.asarray([[10, 0, 5, 5], [4, 4, 4, 4]])
    moved = moe.updated_routing_bias(jnp.zeros((2, 4)), counts, 1e-3)
    np.testing.assert_allclose(moved, [[-1e-3, 1e-3, 0, 0], [0, 0, 0, 0]])


def test_balance_and_z_loss_of_known_routings():
    even = moe.route(jnp.zeros((8, 4)), jnp.zeros((4, 4)), jnp.zeros(4), 2, experts=jnp.asarray([[0, 1], [2, 3]] * 4))
    assert moe.balance_loss(even, batch=2) == pytest.approx(1.0)
    assert moe.z_loss(even) == pytest.approx(np.log(4) ** 2)
    logits = jnp.asarray([[9.0, 9.0, -9.0, -9.0]] * 8)
    crowded = moe.route(logits, jnp.eye(4), jnp.zeros(4), 2)
    assert moe.balance_loss(crowded, batch=2) == pytest.approx(2.0, rel=1e-3)
