"""The speed of a run and the memory it takes, for the log. Imports neither JAX nor PyTorch."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxllm.config import ModelConfig, Precision
from jaxllm.devices import target_of
from jaxllm.model.flops import training_flops_per_token

GIB = 2**30


class Peak(NamedTuple):
    """The reference of the MFU."""

    tflops: float
    source: str  # where it comes from, before `matrix products` in a sentence

    def of_devices(self, count: int) -> "Peak":
        return self._replace(tflops=count * self.tflops)


class TokenFlops(NamedTuple):
    """Model FLOPs of a training token."""

    full: float  # attention counted full (T x T)
    causal: float  # attention counted by its causal half

    @classmethod
    def of(cls, model: ModelConfig, seq_len: int, frozen: bool) -> "TokenFlops":
        """`frozen`: only adapters are trained."""
        return cls(*(training_flops_per_token(model, seq_len, each, frozen=frozen) for each in ("full", "causal")))


class Speed(NamedTuple):
    tokens_per_second: float
    tflops_per_second: float  # model FLOPs, attention counted full
    mfu_full: float  # share of the peak, attention counted full
    mfu_causal: float  # the same, attention counted by its causal half
    data_wait: float  # share of the time in which the loop waited for a batch


class Totals(NamedTuple):
    """Since the first step of this process, evaluations and saving included."""

    steps: int
    seconds: float
    speed: Speed


class Meter:
    """Measures a run from its construction on, between log lines and as a whole.

    Args:
        tokens_per_step, flops: of the run.
        peak_tflops: what the training devices reach in matrix products, in TFLOP/s.
        waited: seconds that the loop has waited for batches so far.
    """

    def __init__(self, tokens_per_step: int, flops: TokenFlops, peak_tflops: float, waited: Callable[[], float]):
        self._tokens_per_step, self._flops = tokens_per_step, flops
        self._peak, self._waited = peak_tflops * 1e12, waited
        self._started = self._lap_started = time.perf_counter()
        self._lap_waited, self._excluded = 0.0, 0.0

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not training, such as an evaluation, from the current lap."""
        self._excluded += seconds

    def lap(self, steps: int) -> Speed:
        """The speed of the `steps` since the last lap, evaluations excluded."""
        now, waited = time.perf_counter(), self._waited()
        speed = self._speed(steps, now - self._lap_started - self._excluded, waited - self._lap_waited)
        self._lap_started, self._lap_waited, self._excluded = now, waited, 0.0
        return speed

    def totals(self, steps: int) -> Totals:
        """Time and speed of all `steps` since the start."""
        seconds = time.perf_counter() - self._started
        return Totals(steps, seconds, self._speed(steps, seconds, self._waited()))

    def _speed(self, steps: int, seconds: float, waited: float) -> Speed:
        rate = steps * self._tokens_per_step / seconds
        full, causal = (rate * flops for flops in self._flops)
        return Speed(rate, full / 1e12, full / self._peak, causal / self._peak, data_wait=waited / seconds)


# A product that takes this many seconds outweighs the cost of launching it. A fast device gets larger matrices until
# one does: sides of 1024 on a few cores, of 8192 on a large GPU.
LONG_ENOUGH = 2e-3
SIDES = (1024, 2048, 4096, 8192)
BUDGET_SECONDS = 0.3


def reference_peak(
    given: float | None, precision: Precision, device_kind: str | None, measure: Callable[[Precision], float]
) -> Peak:
    """TFLOP/s of one device in matrix products: given, of its data sheet, or else measured.

    Args:
        device_kind: the name by which a data sheet is looked up; None: no data sheet holds.
        measure: returns the measured TFLOP/s in a precision.
    """
    if given is not None:
        return Peak(given, f"given for {precision}")
    if device_kind is not None and (target := target_of(device_kind)) is not None:
        return Peak(target.peak_tflops[precision], f"the data sheet's of {target.name}, in dense {precision}")
    return Peak(measure(precision), f"measured on {precision}")


def peak_tflops(prepare: Callable[[int], Callable[[], float]]) -> float:
    """TFLOP/s of the fastest of some large square matrix products, measured in a fraction of a second.

    Nothing else should run meanwhile: with too low a peak a run looks better than it is.

    Args:
        prepare: given a side, returns a warm function that multiplies such matrices and returns the seconds it took.
    """
    side, seconds = _fastest(prepare, SIDES)
    return 2 * side**3 / seconds / 1e12


MEMORY_BYTES = (2**26, 2**28, 2**30)
"""Sizes of an array that is read and written to measure the speed of memory: far above what caches hold."""


def memory_gb_per_s(prepare: Callable[[int], Callable[[], float]]) -> float:
    """GB/s of reading and writing a large array, measured in a fraction of a second. Nothing else should run meanwhile.

    Args:
        prepare: given a number of bytes, returns a warm function that reads and writes as many, and returns the
            seconds it took.
    """
    size, seconds = _fastest(prepare, MEMORY_BYTES)
    return 2 * size / seconds / 1e9


def _fastest(prepare: Callable[[int], Callable[[], float]], sizes: Sequence[int]) -> tuple[int, float]:
    """The first size that takes LONG_ENOUGH, or the last one, and the least seconds that it took."""
    run, best, size = (lambda: 0.0), 0.0, 0
    for size in sizes:
        run = prepare(size)
        if (best := run()) >= LONG_ENOUGH:
            break
    end = time.perf_counter() + BUDGET_SECONDS
    while time.perf_counter() < end:
        best = min(best, run())
    return size, best


def host_peak_gib() -> float:
    """The most memory that this process has held at once (resident set), in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
