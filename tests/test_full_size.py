"""The source's full-size model trains: two steps in a separate process, and its peak memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, time
import jax, numpy as np
from jaxllm.config import recipe
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import count_parameters
from jaxllm.train.computation import Computation
from jaxllm.train.optim import StepNumbers

config = recipe("seed", "customllm-1b").with_options(grad_accum=1, remat=True)
computation = Computation.of(config)
state = jax.jit(computation.init_state)()
assert count_parameters(state.params) == 1_075_060_736
step = jax.jit(computation.train_step, donate_argnums=0)
rows = np.random.default_rng(0).integers(49152, size=(1, 4, 256), dtype=np.int32)
for _ in range(2):
    start = time.perf_counter()
    state, metrics = step(state, TokenBatch(rows), StepNumbers.of(config.optim, config.schedule))
    loss = float(metrics.loss)
    print(f"loss {loss:.4f}, grad_norm {float(metrics.grad_norm):.4f}, {time.perf_counter() - start:.1f} s")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_one_step_of_customllm_1b_fits_into_20_gib():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert float(done.stdout.split()[-1]) <= 20
