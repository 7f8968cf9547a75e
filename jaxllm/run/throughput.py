"""How fast a run goes, and the memory it takes: the log's numbers on it. Imports neither JAX nor PyTorch."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from jaxllm.config import RunConfig
from jaxllm.model.flops import training_flops_per_token

GIB = 2**30


class Speed(NamedTuple):
    tokens_per_second: float
    tflops_per_second: float  # model FLOPs, attention counted full (T x T)
    mfu_full: float  # share of the peak, attention counted full
    mfu_causal: float  # the same, attention counted by its causal half
    data_wait: float  # share of the time in which the loop waited for a batch


class Meter:
    """Measures a run from its construction on, between log lines and as a whole.

    Args:
        config: of the run.
        peak_tflops: what the training device reaches in matrix products, in TFLOP/s.
        waited: seconds that the loop has waited for batches so far.
    """

    def __init__(self, config: RunConfig, peak_tflops: float, waited: Callable[[], float]):
        self._tokens_per_step, self._peak, self._waited = config.tokens_per_step, peak_tflops * 1e12, waited
        self._full = training_flops_per_token(config.model, config.data.seq_len, "full")
        self._causal = training_flops_per_token(config.model, config.data.seq_len, "causal")
        self._started = self._lap_started = time.perf_counter()
        self._lap_waited, self._excluded = 0.0, 0.0

    def exclude(self, seconds: float) -> None:
        """Take from the running lap what was no training: an evaluation."""
        self._excluded += seconds

    def lap(self, steps: int) -> Speed:
        """Over the `steps` since the last lap, evaluations excluded."""
        now, waited = time.perf_counter(), self._waited()
        speed = self._speed(steps, now - self._lap_started - self._excluded, waited - self._lap_waited)
        self._lap_started, self._lap_waited, self._excluded = now, waited, 0.0
        return speed

    def whole(self, steps: int) -> tuple[float, Speed]:
        """Seconds since the start, and the speed of all `steps` in them, evaluations and saving included."""
        seconds = time.perf_counter() - self._started
        return seconds, self._speed(steps, seconds, self._waited())

    def _speed(self, steps: int, seconds: float, waited: float) -> Speed:
        tokens_per_second = steps * self._tokens_per_step / seconds
        return Speed(
            tokens_per_second=tokens_per_second,
            tflops_per_second=tokens_per_second * self._full / 1e12,
            mfu_full=tokens_per_second * self._full / self._peak,
            mfu_causal=tokens_per_second * self._causal / self._peak,
            data_wait=waited / seconds,
        )


# One product of this many seconds outweighs what it costs to start it. A fast device gets larger matrices until it has
# one: sides of 1024 on a few cores, of 8192 on a large GPU.
LONG_ENOUGH = 2e-3
SIDES = (1024, 2048, 4096, 8192)
BUDGET_SECONDS = 0.3


def peak_tflops(prepare: Callable[[int], Callable[[], float]]) -> float:
    """TFLOP/s of the fastest of some large square matrix products.

    A fraction of a second. Nothing else should run meanwhile: too low a peak makes a run look better than it is.

    Args:
        prepare: given a side, makes the matrices and returns what runs their product, warm, and says its seconds.
    """
    for side in SIDES:
        product = prepare(side)
        best = product()
        if best >= LONG_ENOUGH:
            break
    end = time.perf_counter() + BUDGET_SECONDS
    while time.perf_counter() < end:
        best = min(best, product())
    return 2 * side**3 / best / 1e12


def host_peak_gib() -> float:
    """The most memory that this process has held at once (resident set), in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
