"""Peak speed and peak memory of the PyTorch device that trains."""

import time
from collections.abc import Callable

import torch

from jaxllm.config import Precision
from jaxllm.run.throughput import GIB, host_peak_gib, peak_tflops


def measured_peak_tflops(precision: Precision, device: torch.device) -> float:
    """Measured TFLOP/s of matrix products in the given precision."""

    def prepare(side: int) -> Callable[[], float]:
        matrix = torch.ones((side, side), dtype=getattr(torch, precision), device=device)

        def seconds() -> float:
            start = time.perf_counter()
            torch.matmul(matrix, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize()
            elif device.type == "mps":
                torch.mps.synchronize()
            return time.perf_counter() - start

        seconds()  # warm-up: selects the kernel
        return seconds

    return peak_tflops(prepare)


def peak_memory() -> dict[str, float]:
    """Columns of a log record: peak memory of the process and, on CUDA, of the device, in GiB."""
    columns = {"host_peak_gib": host_peak_gib()}
    if torch.cuda.is_available():
        columns["device_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return columns
