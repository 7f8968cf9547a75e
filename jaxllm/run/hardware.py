"""Whether the machine multiplies bfloat16 in hardware: options of a run depend on it, before JAX starts."""

import importlib.util
import os
import re
import subprocess
from importlib.metadata import entry_points
from pathlib import Path


def bfloat16_hardware(root: Path = Path("/")) -> str | None:
    """What multiplies bfloat16 in hardware where JAX will compute: an accelerator or an instruction set.

    It asks the system and not JAX, which may not touch a device before the processes of a run are joined. None: nothing
    does, or it is unknown, and float32 is the safe choice. Unknown are accelerators other than TPUs and NVIDIA's GPUs,
    and a GPU that nvidia-smi does not list, as in a container without that program.

    Args:
        root: of the file system; tests have one of their own.
    """
    first = os.environ.get("JAX_PLATFORM_NAME") or os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    asked = first.lower()
    if asked in ("", "tpu") and importlib.util.find_spec("libtpu") and _devices(root, "accel[0-9]*", "vfio/[0-9]*"):
        return "the TPU"
    if asked in ("", "cuda", "gpu") and _may_use_cuda(root):
        # CUDA may take any of them; the first generation that multiplies bfloat16 is Ampere, 8.0
        return "the GPU" if min(_compute_capabilities(), default=0.0) >= 8.0 else None
    if asked == "" and any("cuda" not in plugin.name for plugin in entry_points(group="jax_plugins")):
        return None
    return cpu_bfloat16(root) if asked in ("", "cpu") else None


def cpu_bfloat16(root: Path = Path("/")) -> str | None:
    """The processor's instruction set that multiplies bfloat16; None: it has none, or it is unknown."""
    try:
        cpuinfo = (root / "proc/cpuinfo").read_text(errors="replace")
        flags = set(re.findall(r"^flags\s*:(.*)", cpuinfo, re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return None
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), None)


def _devices(root: Path, *patterns: str) -> bool:
    return any(any((root / "dev").glob(pattern)) for pattern in patterns)


def _may_use_cuda(root: Path) -> bool:
    """Whether JAX will try an NVIDIA GPU: its plugin is installed, and a GPU is there (`dxg`: WSL) and not hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)  # CUDA ends the list where it is wrong
    installed = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
    return installed and not hidden and _devices(root, "nvidia[0-9]*", "nvidiactl", "dxg")


def _compute_capabilities() -> list[float]:
    """Of all NVIDIA GPUs of the machine, without starting CUDA; empty if nvidia-smi fails."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return [float(line) for line in done.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
