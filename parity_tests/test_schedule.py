"""The learning rate over the steps: both frameworks have the same, also where a run is resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxllm.config import TrainConfig
from jaxllm.errors import UserError
from jaxllm.train.optim import StepNumbers, learning_rate
from torch_ref.step import make_schedule

COSINE = {"steps": 40, "warmup_steps": 7}
SCHEDULES = {
    "cosine": COSINE,
    "wsd": COSINE | {"schedule": "wsd"},
    "wsd that decays at once": COSINE | {"schedule": "wsd", "decay_steps": 33},
    "wsd without warm-up": {"steps": 40, "warmup_steps": 0, "schedule": "wsd", "decay_steps": 3},
    "more warm-up than steps": {"steps": 5, "warmup_steps": 7, "schedule": "wsd"},
}


def jax_rates(config: TrainConfig) -> np.ndarray:
    return np.asarray(
        learning_rate(StepNumbers.of(config.optim, config.schedule), np.arange(config.schedule.steps + 1))
    )


def torch_rates(config: TrainConfig, steps_done: int = 0) -> np.ndarray:
    """The rates from update `steps_done` to the one after the last."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.optim.learning_rate)
    schedule, rates = make_schedule(optimizer, config.schedule, config.optim.learning_rate, steps_done), []
    for _ in range(steps_done, config.schedule.steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.asarray(rates)


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_frameworks_have_the_same_rates(name):
    config = TrainConfig.from_options(**SCHEDULES[name])
    ours, atol = jax_rates(config), 1e-7 * config.optim.learning_rate  # float32 at the end of the cosine
    np.testing.assert_allclose(torch_rates(config), ours, rtol=1e-6, atol=atol)
    np.testing.assert_allclose(torch_rates(config, 3), ours[3:], rtol=1e-6, atol=atol)


def test_wsd_keeps_its_peak_until_the_decay():
    config = TrainConfig.from_options(**SCHEDULES["wsd"], learning_rate=2.0)
    rates = jax_rates(config)
    np.testing.assert_allclose(rates[:8], 2.0 * np.arange(8) / 7, rtol=1e-6)
    assert (rates[7:33] == 2.0).all()
    np.testing.assert_allclose(rates[32:], 2.0 * np.arange(8, -1, -1) / 8, rtol=1e-6)  # a fifth of 40 steps


def test_more_steps_of_wsd_change_no_rate_before_the_decay():
    """So a run that is resumed before its decay equals one that had the steps from its beginning."""
    short, long = (
        jax_rates(TrainConfig.from_options(steps=steps, warmup_steps=7, schedule="wsd", decay_steps=8))
        for steps in (40, 60)
    )
    assert (short[:33] == long[:33]).all()
    assert short[33] != long[33]
    cosine = [jax_rates(TrainConfig.from_options(steps=steps, warmup_steps=7))[:33] for steps in (40, 60)]
    assert (cosine[0] != cosine[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_steps": 5}, "decay_steps is 5: only --schedule wsd"),
        (COSINE | {"schedule": "wsd", "decay_steps": 34}, "decay_steps is 34: it must be at most 33"),
        ({"steps": 10, "warmup_steps": 12, "schedule": "wsd", "decay_steps": 3}, "warmup_steps is 12: .* the 10 steps"),
        ({"steps": 10, "warmup_steps": 10, "schedule": "wsd", "decay_steps": 3}, "warmup_steps is 10: .* the 10 steps"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.from_options(**options)
