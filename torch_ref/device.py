"""The device that trains, as PyTorch sees it: what `jaxllm.device` is for JAX."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from jaxllm.config import Precision
from jaxllm.meter import GIB, host_peak_gib

# As in `jaxllm.device`.
LONG_ENOUGH = 2e-3
SIDES = (1024, 2048, 4096, 8192)
BUDGET_SECONDS = 0.3


def measured_peak_tflops(precision: Precision, device: torch.device) -> float:
    """TFLOP/s of the fastest of some large square matrix products in the given precision, warm.

    A fraction of a second. Nothing else should run meanwhile: too low a peak makes a run look better than it is.
    """
    for side in SIDES:
        matrix = torch.ones((side, side), dtype=getattr(torch, precision), device=device)
        _seconds(matrix)  # chooses its kernel
        best = _seconds(matrix)
        if best >= LONG_ENOUGH:
            break
    end = time.perf_counter() + BUDGET_SECONDS
    while time.perf_counter() < end:
        best = min(best, _seconds(matrix))
    return 2 * side**3 / best / 1e12


def _seconds(matrix: Tensor) -> float:
    start = time.perf_counter()
    product = matrix @ matrix
    if product.device.type == "cuda":
        torch.cuda.synchronize()
    elif product.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def peak_memory() -> dict[str, float]:
    """Columns of a log line: the process's peak in GiB and, on CUDA, the device's."""
    columns = {"host_peak_gib": host_peak_gib()}
    if torch.cuda.is_available():
        columns["device_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return columns
