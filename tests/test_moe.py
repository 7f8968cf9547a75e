"""Routing and the experts: no token is dropped, whatever the imbalance, and the gradients are those of a plain loop."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxllm.model import load_balance, moe
from jaxllm.model.kernels import choose_kernels, grouped_loop
from jaxllm.model.kernels.expert_ffn import expert_ffn, expert_slice
from jaxllm.model.kernels.token_dispatch import combine, gather_slots, plan_dispatch
from tests.configs import small

SMALL = small(vocab_size=64, num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


ROWS = 2400  # of 1,200 tokens, two experts for each


@jax.jit
def oracle_and_gradients(cotangent, x, gates, weights, experts):
    """All tokens through one expert after another, times what their slots of this expert weigh; plain autodiff."""

    def function(x, gates, weights):
        out = jnp.zeros_like(x)
        for e, (gate, up, down) in enumerate(zip(*weights, strict=True)):
            weight = jnp.where(experts == e, gates, 0).sum(axis=1, keepdims=True)
            out += weight * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
        return out

    out, pullback = jax.vjp(function, x, gates, weights)
    return out, pullback(cotangent)


def chosen_experts(x, gates, weights, experts, kernels=grouped_loop.KERNELS):
    plan = plan_dispatch(experts, len(weights[0]))
    return expert_ffn(kernels, x, gates, plan, expert_slice(kernels, weights, x.dtype)).output


@functools.partial(jax.jit, static_argnums=0)
def expert_ffn_and_gradients(recomputes, cotangent, x, gates, weights, experts):
    kernels = dataclasses.replace(grouped_loop.KERNELS, recomputes=recomputes)
    function = functools.partial(chosen_experts, experts=experts, kernels=kernels)
    out, pullback = jax.vjp(function, x, gates, weights)
    return out, pullback(cotangent)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(st.sampled_from([0, 1, 16, 17, 33, 256, 257, 300, 1024, 1025]), min_size=3, max_size=3)
    .filter(lambda sizes: sum(sizes) <= ROWS)
    .flatmap(lambda sizes: st.permutations([*sizes, ROWS - sum(sizes)])),
    st.sampled_from([4, 3]),
    st.integers(0, 2**31),
)
def test_expert_ffn_equals_a_loop_over_experts(sizes, here, seed):
    """Of four experts, of which the last may be on another device."""
    keys = jax.random.split(jax.random.key(seed), 7)
    x, cotangent = (jax.random.normal(key, (ROWS // 2, 8)) for key in keys[:2])
    gates = jax.random.uniform(keys[2], (ROWS // 2, 2))
    shapes = ((here, 8, 6), (here, 8, 6), (here, 6, 8))
    weights = tuple(jax.random.normal(key, shape) for key, shape in zip(keys[3:6], shapes, strict=True))
    experts = jax.random.permutation(keys[6], np.repeat(np.arange(4), sizes)).reshape(-1, 2)

    wanted = oracle_and_gradients(cotangent, x, gates, weights, experts)
    for recomputes in (False, True):
        made = expert_ffn_and_gradients(recomputes, cotangent, x, gates, weights, experts)
        for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11 * np.abs(theirs).max())


def test_the_backward_pass_moves_rows_by_gathers_alone():
    x, gates, experts = jnp.ones((6, 8)), jnp.ones((6, 2)), jnp.arange(12).reshape(6, 2) % 4
    weights = jnp.ones((4, 8, 6)), jnp.ones((4, 8, 6)), jnp.ones((4, 6, 8))
    _, pullback = jax.vjp(functools.partial(chosen_experts, experts=experts), x, gates, weights)
    program = str(jax.make_jaxpr(pullback)(x))
    assert "gather" in program
    assert "scatter" not in program


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU")
def test_joined_weights_stay_in_bfloat16():
    """XLA's CPU before JAX 0.12 joins arrays of bfloat16 in float32, and converts all of them twice for it."""
    x, gates, experts = jnp.ones((64, 8), jnp.bfloat16), jnp.ones((64, 2)), jnp.arange(128).reshape(64, 2) % 4
    weights = jnp.ones((4, 8, 6)), jnp.ones((4, 8, 6)), jnp.ones((4, 6, 8))
    experts_of = functools.partial(chosen_experts, experts=experts)

    @jax.jit
    def both_passes(x, gates, weights):
        return jax.vjp(experts_of, x, gates, weights)[1](x)

    def joins_in_float32(program) -> bool:
        return "f32[8,12]{1,0} concatenate" in program.compile().as_text()

    if jax.__version_info__ < (0, 11):  # a control
        halves = [jnp.ones((8, 6), jnp.bfloat16)] * 2
        assert joins_in_float32(jax.jit(lambda halves: jnp.concatenate(halves, axis=1)).lower(halves))
    assert not joins_in_float32(both_passes.lower(x, gates, weights))


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


@pytest.mark.parametrize("groups", [2, 4, 7, 64])
def test_groups_of_about_an_even_share_are_hardly_padded(groups):
    def most_padding(sizes, share: int) -> float:
        held = range(-(-share * 85 // 100), share * 125 // 100)
        return max(next(size for size in sizes if size >= group) / group for group in held) - 1

    for share in range(128, 801):
        padded = groups * share + grouped_loop.padding(groups * share)
        assert most_padding(grouped_loop.block_sizes(padded, groups), share) < 0.2
    assert most_padding(grouped_loop.BLOCK_ROWS, 500) > 0.4  # a control


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
    kernels = choose_kernels(SMALL, jnp.float64)
    layer = nnx.jit(lambda: moe.DeepSeekMoE(SMALL, kernels=kernels, dtype=jnp.float64, rngs=nnx.Rngs(0)))()
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


def test_each_slot_has_the_row_that_is_its_own():
    experts = jax.random.randint(jax.random.key(1), (40, 3), 0, 6)
    plan: Any = plan_dispatch(experts, 5)  # the last is on another device
    assert (np.diff(np.asarray(experts).reshape(-1)[plan.order]) >= 0).all()
    assert plan.group_sizes.tolist() == [int((experts == e).sum()) for e in range(5)]
    here = np.asarray(experts) < 5
    rows = np.asarray(plan.rows)
    np.testing.assert_array_equal(np.asarray(plan.order)[rows[here]], np.arange(120).reshape(40, 3)[here])
    assert (rows[~here] == 120).all()
    numbers = jnp.arange(120.0)[:, None]
    np.testing.assert_array_equal(combine(numbers, plan)[:, 0], np.where(here, rows, 0).sum(axis=1))
    np.testing.assert_array_equal(gather_slots(numbers, plan), np.where(here, rows, 0))


def test_routing_bias_moves_against_the_crowd():
    counts = jnp.asarray([[10, 0, 5, 5], [4, 4, 4, 4]])
    moved = load_balance.updated_routing_bias(jnp.zeros((2, 4)), counts, 1e-3)
    np.testing.assert_allclose(moved, [[-1e-3, 1e-3, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("experts", [3, 7, 60])
def test_equal_counts_move_no_routing_bias(experts):
    """Compiled, the mean is a product with 1 / E in float32, which need not give back a count."""
    counts = jnp.repeat(jnp.arange(1, 4000, 7, dtype=jnp.int32)[:, None], experts, axis=1)  # (L,E)
    moved = jax.jit(load_balance.updated_routing_bias)(jnp.zeros(counts.shape), counts, 1e-3)
    assert not moved.any()
    one_more = jax.jit(load_balance.updated_routing_bias)(jnp.zeros(counts.shape), counts.at[:, 0].add(1), 1e-3)
    assert (one_more[:, 0] < 0).all()
    assert (one_more[:, 1:] > 0).all()


def test_balance_and_z_loss_of_known_routings():
    even = moe.route(jnp.zeros((8, 4)), jnp.zeros((4, 4)), jnp.zeros(4), 2, experts=jnp.asarray([[0, 1], [2, 3]] * 4))
    assert load_balance.balance_loss(even, batch=2) == pytest.approx(1.0)
    assert load_balance.z_loss(even) == pytest.approx(np.log(4) ** 2)
    logits = jnp.asarray([[9.0, 9.0, -9.0, -9.0]] * 8)
    crowded = moe.route(logits, jnp.eye(4), jnp.zeros(4), 2)
    assert load_balance.balance_loss(crowded, batch=2) == pytest.approx(2.0, rel=1e-3)
