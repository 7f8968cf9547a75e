"""The machine of a measurement (without its host name), its free memory and its load."""

import os
import platform
from pathlib import Path
from typing import Any

from jaxllm.packages import version_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")

# those that determine the speed of matrix products
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16")


def describe_machine() -> dict[str, Any]:
    """CPU model, cores, memory in GiB, instruction sets, system, and package versions."""
    pairs = (line.split(":", 1) for line in _lines("/proc/cpuinfo") if ":" in line)
    info = {name.strip(): value.strip() for name, value in pairs}
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name", platform.machine()),
        "family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def available_gib() -> float:
    """Memory available without swapping, in GiB; infinite if the system does not report it."""
    lines = (line.split() for line in _lines("/proc/meminfo"))
    return next((int(size) / 2**20 for name, size, *_ in lines if name == "MemAvailable:"), float("inf"))


def busy_seconds() -> float:
    """CPU seconds of all programs, and of other virtual machines, since the start; 0 if the system does not say."""
    for line in _lines("/proc/stat")[:1]:
        user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, line.split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _lines(file: str) -> list[str]:
    """None on a system that has no such file."""
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []
