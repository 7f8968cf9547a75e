"""The PyTorch device that trains: whether it multiplies bfloat16 in hardware, its peak speed and peak memory."""

import time
from collections.abc import Callable

import torch

from jaxllm.config import Precision
from jaxllm.run.hardware import cpu_bfloat16
from jaxllm.run.throughput import GIB, host_peak_gib, peak_tflops


def bfloat16_hardware(device: torch.device) -> str | None:
    """The hardware that multiplies bfloat16 on the device, as `jaxllm.run.hardware` names it; None: unknown."""
    if device.type == "cuda":
        return "the GPU" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return cpu_bfloat16() if device.type == "cpu" else None


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
