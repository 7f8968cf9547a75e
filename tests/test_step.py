"""The training step: accumulation, schedule, clipping, weight decay, routing bias, determinism."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import PRESETS, TrainConfig, recipe
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import model_facts
from jaxllm.train.computation import Computation
from jaxllm.train.loss import IGNORED
from jaxllm.train.optim import StepNumbers, learning_rate
from jaxllm.train.state import TrainState
from tests.configs import small

CONFIG = TrainConfig.from_options(
    model=small(vocab_size=61, num_hidden_layers=2, max_position_embeddings=32, dropout=0.0),
    seq_len=8,
    steps=50,
    warmup_steps=2,
    bias_update_rate=1e-2,
)

# every 1,000 steps of the source's log, as it prints them, and its first and last lines
SEED_LOG = {
    100: 1.0000000000000002e-06,
    1000: 1e-05,
    2000: 2e-05,
    2100: 1.9992290362407232e-05,
    3000: 1.9238795325112867e-05,
    4000: 1.7071067811865477e-05,
    5000: 1.3826834323650899e-05,
    6000: 1e-05,
    7000: 6.173165676349103e-06,
    8000: 2.9289321881345257e-06,
    9000: 7.612046748871327e-07,
    9900: 7.70963759277099e-09,
    10000: 0.0,
}


def labels(rows: int, seed: int = 0, length: int = 8) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, CONFIG.model.vocab_size)


# Each config and shape of a batch is a program: tests share them.
CLIPPED_AND_FROZEN = CONFIG.with_options(max_grad_norm=1e-3, bias_update_rate=0.0)


@functools.cache
def first_state() -> TrainState:
    return jax.jit(Computation.of(CONFIG).init_state)()


@functools.cache
def programs(computation: Computation) -> Callable:
    return jax.jit(computation.train_step)


def step_of(config: TrainConfig) -> Callable:
    step = programs(Computation.of(config))
    return functools.partial(step, numbers=StepNumbers.of(config.optim, config.schedule))


def run(config: TrainConfig, *batches: jax.Array):
    state, losses = first_state(), []
    for batch in batches:
        state, metrics = step_of(config)(state, TokenBatch(batch))
        losses.append(float(metrics.loss))
    return state, losses, metrics


def test_accumulation_is_one_large_batch():
    """Mean over all targets, not a mean of means: the micro-batches have different numbers of targets."""
    rows = labels(8).at[0, 4:].set(IGNORED).at[1].set(IGNORED)
    whole, (loss,), metrics = run(CONFIG, rows[None])
    parts, (accumulated,), other = run(CONFIG, rows.reshape(4, 2, 8))
    assert accumulated == pytest.approx(loss, rel=1e-6)
    assert float(other.grad_norm) == pytest.approx(float(metrics.grad_norm), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, parts.params)
    jax.tree.map(np.testing.assert_array_equal, whole.routing_bias, parts.routing_bias)


def test_mean_of_means_would_be_caught():
    rows = labels(8).at[0, 4:].set(IGNORED).at[1].set(IGNORED)
    _, (loss,), _ = run(CONFIG, rows[None])
    others = [[row for row in range(8) if row not in (i, i + 1)] for i in (0, 2, 4, 6)]
    means = [run(CONFIG, rows.at[jnp.asarray(ignored)].set(IGNORED)[None])[1][0] for ignored in others]
    assert np.mean(means) != pytest.approx(loss, rel=1e-5)  # ten times what the test above allows


def test_routing_bias_moves_by_its_rate_and_only_then():
    state, _, _ = run(CONFIG, labels(8)[None])
    bias = np.asarray(state.routing_bias["decoder_layers"]["mlp"]["routing_bias"])
    assert set(np.unique(np.abs(bias)).round(8)) <= {0.0, np.float32(0.01).round(8)}
    assert bias.any()
    frozen, _, _ = run(CLIPPED_AND_FROZEN, labels(8)[None])
    assert not np.asarray(frozen.routing_bias["decoder_layers"]["mlp"]["routing_bias"]).any()


def test_the_log_shows_the_rate_of_the_next_update():
    """As the source's does: its line of step 100 has the rate of step 101."""
    _, _, metrics = run(CONFIG, labels(8)[None])
    assert float(metrics.learning_rate) == pytest.approx(CONFIG.optim.learning_rate / CONFIG.schedule.warmup_steps)


@pytest.mark.slow  # tests/test_train.py sees it of a run
def test_learns_and_is_deterministic():
    batches = [labels(4, seed=i % 2)[None] for i in range(30)]
    config = CONFIG.with_options(learning_rate=1e-2, warmup_steps=0)
    _, first, _ = run(config, *batches)
    _, second, _ = run(config, *batches)
    assert first == second
    assert first[-1] < 0.7 * first[0]


@pytest.mark.slow  # parity_tests/test_trainer.py compares steps that have them
def test_auxiliary_losses_change_the_gradient_and_not_the_logged_loss():
    batch = labels(8)[None]
    plain, (loss,), _ = run(CONFIG, batch)
    for name in ("balance_loss", "router_z_loss"):
        state, (same,), _ = run(CONFIG.with_options(**{name: 0.1}), batch)
        assert same == loss
        router = [s.params["decoder_layers"]["mlp"]["router"]["weight"] for s in (plain, state)]
        assert plain.opt_state.mu["decoder_layers"]["mlp"]["router"]["weight"].shape == router[0].shape
        moments = [s.opt_state.mu["decoder_layers"]["mlp"]["router"]["weight"] for s in (plain, state)]
        assert not np.allclose(*moments)


def test_dropout_differs_from_step_to_step_and_repeats_from_the_seed():
    config = CONFIG.with_options(learning_rate=0.0, model=dataclasses.replace(CONFIG.model, dropout=0.5))
    batch = labels(4)[None]
    _, losses, _ = run(config, batch, batch)
    assert losses[0] != losses[1]
    assert run(config, batch, batch)[1] == losses


def test_only_matrices_decay():
    facts, _ = model_facts(CONFIG.model)
    assert facts["decoder_layers"]["self_attn"]["kv_proj_d"]["weight"].decays
    assert facts["token_embeddings"]["weight"].decays
    assert not facts["decoder_layers"]["input_norm"]["weight"].decays
    assert not facts["lm_head"]["bias"].decays
    assert not model_facts(PRESETS["tiny"])[0]["final_norm"]["weight"].decays


def test_gradients_are_clipped_to_the_norm():
    state, _, metrics = run(CLIPPED_AND_FROZEN, labels(8)[None])
    assert float(metrics.grad_norm) > 1e-3
    first_moment = np.sqrt(sum(float(jnp.square(m).sum()) for m in jax.tree.leaves(state.opt_state.mu)))
    assert first_moment == pytest.approx((1 - CONFIG.optim.beta1) * 1e-3, rel=1e-5)


def logged_learning_rates() -> dict[int, float]:
    """The source's log if it is next to the checkout, otherwise its key lines."""
    log = Path(__file__).parents[2] / "shared" / "seed" / "customllm.md"
    if not log.is_file():
        return SEED_LOG
    lines = [ast.literal_eval(line.strip()) for line in log.read_text().splitlines() if line.startswith("{'loss'")]
    return {line["step"]: line["learning_rate"] for line in lines}


def test_the_source_s_learning_rates_are_reproduced():
    seed = recipe("seed", "customllm-1b")

    def schedule(step: int) -> jax.Array:
        return learning_rate(StepNumbers.of(seed.optim, seed.schedule), step)

    log = logged_learning_rates()
    assert SEED_LOG.items() <= log.items()
    with jax.enable_x64(True):
        for step, rate in log.items():
            # the source's log line of a step shows the rate that the scheduler has set for the next update
            assert float(schedule(step)) == pytest.approx(rate, abs=1e-12)
    for step, rate in log.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=2e-6, abs=1e-11)
