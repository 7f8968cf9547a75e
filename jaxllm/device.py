"""The device that trains, as JAX sees it: its name, what it reaches in matrix products, how much memory it has used."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from jaxllm.config import Precision
from jaxllm.meter import GIB, host_peak_gib

# One product of this many seconds outweighs what it costs to start it. A fast device gets larger matrices until it has
# one: sides of 1024 on a few cores, of 8192 on a large GPU.
LONG_ENOUGH = 2e-3
SIDES = (1024, 2048, 4096, 8192)
BUDGET_SECONDS = 0.3


def device_name() -> str:
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def measured_peak_tflops(precision: Precision) -> float:
    """TFLOP/s of the fastest of some large square matrix products in the given precision, warm, on the first device.

    A fraction of a second. Nothing else should run meanwhile: too low a peak makes a run look better than it is.
    """
    multiply = jax.jit(jnp.matmul)
    for side in SIDES:
        matrix = jnp.ones((side, side), precision)
        multiply(matrix, matrix).block_until_ready()  # compiles
        best = _seconds(multiply, matrix)
        if best >= LONG_ENOUGH:
            break
    end = time.perf_counter() + BUDGET_SECONDS
    while time.perf_counter() < end:
        best = min(best, _seconds(multiply, matrix))
    return 2 * side**3 / best / 1e12


def _seconds(multiply, matrix: jax.Array) -> float:
    start = time.perf_counter()
    multiply(matrix, matrix).block_until_ready()
    return time.perf_counter() - start


def peak_memory() -> dict[str, float]:
    """Columns of a log line: the process's peak in GiB and, where the device keeps count (GPU, TPU), the device's."""
    columns = {"host_peak_gib": host_peak_gib()}
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        columns["device_peak_gib"] = statistics["peak_bytes_in_use"] / GIB
    return columns
