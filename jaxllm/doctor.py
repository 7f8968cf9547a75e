"""What a bug report needs: devices, versions, the kernels that are chosen and their self-check, and measured speeds.

python -m jaxllm.doctor
python -m jaxllm.doctor --preset deepseek-v2-lite    # with the sizes of another model

It trains nothing and reads no run. Exits with 1 where a kernel fails.
"""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, get_args

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from jaxllm.command_line import parse
from jaxllm.config import PRESETS, ModelConfig, Precision, preset
from jaxllm.devices import target_of
from jaxllm.errors import exit_on_user_error
from jaxllm.model.kernels import choose_kernels, describe_kernels
from jaxllm.model.kernels.self_check import Check, check_kernels
from jaxllm.packages import version_of
from jaxllm.run.hardware import bfloat16_hardware, versions
from jaxllm.run.runtime import (
    device_name,
    measured_memory_gb_per_s,
    measured_peak_tflops,
    start_jax,
    use_compilation_cache,
)
from jaxllm.run.self_check import failures
from jaxllm.run.throughput import GIB

PACKAGES = ("jaxllm", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")

WIDTH = 120
"""Columns of output that does not go to a terminal."""


@dataclass(frozen=True)
class DoctorArgs:
    """Describe the devices here, and check the kernels that a model would use on them."""

    preset: Annotated[str, tyro.conf.arg(help=f"The model's shape: one of {', '.join(PRESETS)}.")] = "customllm-1b"


def describe_machine() -> Iterator[tuple[str, str]]:
    """Names and values; nothing that names the machine or its user."""
    device, devices = jax.devices()[0], jax.devices()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    memory = f"{limit / GIB:.2f} GiB that a program may have" if limit else "memory unknown"
    capability = getattr(device, "compute_capability", None)
    yield "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    yield "packages", ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in PACKAGES)
    yield "software of the device", ", ".join(f"{name} {version}" for name, version in versions().items())
    yield "devices", f"{len(devices)} x {device_name()}, {memory}"
    if capability is not None:
        yield "compute capability", str(capability)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield "host", f"{os.cpu_count()} processors, {host / GIB:.1f} GiB"
    bfloat16 = bfloat16_hardware()
    decided = f"--precision auto is {'bfloat16' if bfloat16 else 'float32'}"
    yield "bfloat16 in hardware", f"{bfloat16 or 'nothing known'}: {decided}"


def describe_speeds() -> Iterator[tuple[str, str]]:
    """Measured in about a second each, beside the data sheet."""
    target = target_of(jax.devices()[0].device_kind)
    for precision in get_args(Precision):
        sheet = f"data sheet {target.peak_tflops[precision]:,.4g}" if target else "no data sheet"
        yield f"{precision} product", f"{measured_peak_tflops(precision):,.4g} TFLOP/s ({sheet})"
    sheet = f"data sheet {target.memory_gb_per_s:,.4g}" if target else "no data sheet"
    yield "memory, read and written", f"{measured_memory_gb_per_s():,.4g} GB/s ({sheet})"


def self_check(config: ModelConfig) -> dict[Precision, list[Check]]:
    """All kernels that a model has here, in each precision, whatever was found before."""
    dtypes = {precision: jnp.dtype(precision) for precision in get_args(Precision)}
    return {p: check_kernels(choose_kernels(config, dtype), config, dtype) for p, dtype in dtypes.items()}


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    args: DoctorArgs = parse(DoctorArgs, argv, "python -m jaxllm.doctor", __doc__)
    config = preset(args.preset)
    use_compilation_cache()
    start_jax()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for name, value in describe_machine():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    for name, value in describe_speeds():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    for precision in get_args(Precision):
        chosen = describe_kernels(config, jnp.dtype(precision))
        console.print(f"kernels of {args.preset}: {chosen}", markup=False, highlight=False)
    checked = self_check(config)
    table = Table("kernel", "result", *get_args(Precision), title=f"Self-check: errors, sizes of {args.preset}")
    for kernel, what in dict.fromkeys((check.kernel, check.what) for checks in checked.values() for check in checks):
        cells = ({(c.kernel, c.what): c for c in checks}.get((kernel, what)) for checks in checked.values())
        table.add_row(kernel, what, *(_cell(check) for check in cells))
    console.print(table)
    failed = {precision: failures(checks) for precision, checks in checked.items()}
    for precision, of_precision in failed.items():
        for kernel, failure in of_precision.items():
            console.print(f"{precision}, {kernel}: {failure}", markup=False, highlight=False)
    return 1 if any(failed.values()) else 0


def _cell(check: Check | None) -> str:
    if check is None:
        return ""
    return f"{check.error:.1e}" + ("" if check.failure is None else " FAILED")


if __name__ == "__main__":
    sys.exit(main())
