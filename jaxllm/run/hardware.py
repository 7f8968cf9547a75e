"""What a run must know of its devices: whether they multiply bfloat16 in hardware, and their software's versions."""

import ctypes
import functools
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Instruction sets that multiply bfloat16."""

ROCM_WITH_BFLOAT16 = r"gfx(908|90a|94|95|11|12)"
"""AMD's matrix cores from the MI100 on, and the desktop cards' from RDNA 3 on."""


def bfloat16_hardware() -> str | None:
    """What multiplies bfloat16 in hardware on JAX's devices of this process: an accelerator or an instruction set.

    It starts JAX. None: not all devices have it, or one does not tell, and float32 is the safe choice.
    """
    import jax  # here: `torch_ref` works without it

    found = [_of_device(device) for device in jax.local_devices()]
    return None if None in found else found[0]


def _of_device(device: Any) -> str | None:
    if device.platform == "cpu":
        return cpu_bfloat16()
    if device.platform == "tpu":
        return "the TPU"
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; ROCm's is "gfx942"
    if re.fullmatch(r"\d+\.\d+", capability):
        return "the GPU" if float(capability) >= 8 else None  # from Ampere on
    return "the GPU" if re.match(ROCM_WITH_BFLOAT16, capability) else None


def cpu_bfloat16(root: Path = Path("/")) -> str | None:
    """The processor's instruction set that multiplies bfloat16; None: it has none, or the system does not tell.

    Args:
        root: of the file system; tests have one of their own.
    """
    try:
        cpuinfo = (root / "proc/cpuinfo").read_text(errors="replace")
        flags = set(re.findall(r"^flags\s*:(.*)", cpuinfo, re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return None
    return next((name for name in CPU_INSTRUCTIONS if name in flags), None)


@functools.cache
def versions() -> dict[str, str]:
    """Of JAX and, on an NVIDIA GPU, of its driver, CUDA and cuDNN: what decides which kernels work. It starts JAX."""
    import jax

    found = {"JAX": jax.__version__, "jaxlib": version("jaxlib")}
    if jax.default_backend() == "gpu":
        runtime = " ".join(jax.local_devices()[0].client.platform_version.split())
        found |= {"driver": _driver(), "runtime": runtime, "cuDNN": _cudnn()}
    return found


def _driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Of NVIDIA's kernel module, which containers see too."""
    try:
        return re.findall(r"NVRM version:.*?\s(\d+\.[\d.]+)", file.read_text(errors="replace"))[0]
    except (OSError, IndexError):
        return "unknown"


def _cudnn() -> str:
    """Of the library that JAX has loaded, by its own word."""
    try:
        number = int(ctypes.CDLL("libcudnn.so.9").cudnnGetVersion())  # 91301: 9.13.1
    except (OSError, AttributeError):
        return "unknown"
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
