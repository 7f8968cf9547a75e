"""The device that trains, as JAX sees it: its name, what it reaches in matrix products, how much memory it has used."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.config import Precision
from jaxllm.meter import GIB, host_peak_gib, peak_tflops


def device_name() -> str:
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def measured_peak_tflops(precision: Precision) -> float:
    """TFLOP/s in matrix products of the given precision, on the first device."""
    multiply = jax.jit(jnp.matmul)

    def prepare(side: int) -> Callable[[], float]:
        matrix = jnp.ones((side, side), precision)
        multiply(matrix, matrix).block_until_ready()  # compiles

        def seconds() -> float:
            start = time.perf_counter()
            multiply(matrix, matrix).block_until_ready()
            return time.perf_counter() - start

        return seconds

    return peak_tflops(prepare)


def peak_memory() -> dict[str, float]:
    """Columns of a log line: the process's peak in GiB and, where the device keeps count (GPU, TPU), the device's."""
    columns = {"host_peak_gib": host_peak_gib()}
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        columns["device_peak_gib"] = statistics["peak_bytes_in_use"] / GIB
    return columns
