"""The PyTorch model on a real MPS device, if there is one; `test_mps` needs none."""

from __future__ import annotations

import pytest
import torch

from parity_tests import mps_runs
from torch_ref.step import make_optimizer, make_schedule, train_step


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a Mac")
def test_steps_on_mps_have_the_losses_of_the_cpu():
    config = mps_runs.train_config("float32")
    losses = {}
    for device in ("cpu", "mps"):
        model = mps_runs.model().train().to(device)
        model.dropout.p = 0.0  # the two devices draw different numbers
        optimizer = make_optimizer(model, config.optim, config.precision)
        schedule = make_schedule(optimizer, config.schedule, config.optim.learning_rate)
        losses[device] = [
            train_step(
                model, optimizer, schedule, config.optim, config.precision, mps_runs.labels().to(device)
            ).loss.item()
            for _ in range(3)
        ]
    assert losses["mps"] == pytest.approx(losses["cpu"], rel=1e-4)
