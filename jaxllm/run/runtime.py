"""What surrounds a process that trains: the compilation cache, the device's name, speed and memory."""

import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.config import Precision
from jaxllm.errors import as_user_error, one_line
from jaxllm.files import cache_folder
from jaxllm.model.numerics import pin_numerics
from jaxllm.run.throughput import GIB, host_peak_gib, memory_gb_per_s, peak_tflops

MAX_CACHE_BYTES = 2 * 2**30
"""Size of the compilation cache, beyond which the programs that were not used for longest are deleted."""

MIN_COMPILE_SECONDS = 0.05
"""A program that compiles faster is not kept."""


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, and read them from there; a cache that the user configured in JAX takes priority.

    JAX's key holds the program, its options, the versions of JAX and XLA and the device with its instruction set.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:  # JAX_COMPILATION_CACHE_DIR
        return
    try:
        folder = cache_folder("xla")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        print(f"Programs are compiled again in each run: the cache cannot be used ({one_line(error)})", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def start_jax() -> None:
    """Pin what changes JAX's numbers, and check that it finds the devices that it is asked to use.

    Raises:
        UserError: it finds none, or cannot start them; or it may not compile.
    """
    pin_numerics()
    wanted = jax.config.values["jax_platforms"]
    remedy = "install its support (for NVIDIA GPUs: pip install 'jax[cuda13]'), or unset JAX_PLATFORMS"
    what = f"JAX_PLATFORMS is {wanted!r}: JAX cannot use such a device here"
    with as_user_error(lambda error: f"{what} ({one_line(error)}); {remedy}"):
        jax.devices()


def device_name() -> str:
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


@functools.cache  # of each of the precisions
def measured_peak_tflops(precision: Precision) -> float:
    """TFLOP/s in matrix products of the given precision, on the first device; measured once in a process."""
    multiply = jax.jit(jnp.matmul)

    def prepare(side: int) -> Callable[[], float]:
        matrix = jnp.ones((side, side), precision)
        return _timed(lambda: multiply(matrix, matrix))

    return peak_tflops(prepare)


def measured_memory_gb_per_s() -> float:
    """GB/s of reading and writing memory, on the first device."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def prepare(size: int) -> Callable[[], float]:
        array = jnp.zeros(size // 4, jnp.float32)

        def step() -> jax.Array:
            nonlocal array
            array = add(array)
            return array

        return _timed(step)

    return memory_gb_per_s(prepare)


def _timed(step: Callable[[], jax.Array]) -> Callable[[], float]:
    """A function that takes a step and returns the seconds of it; the first step, which compiles, is taken here."""
    step().block_until_ready()

    def seconds() -> float:
        start = time.perf_counter()
        step().block_until_ready()
        return time.perf_counter() - start

    return seconds


def peak_memory() -> dict[str, float]:
    """Columns of a log line: the process's peak in GiB and, where the device keeps count (GPU, TPU), the device's."""
    columns = {"host_peak_gib": host_peak_gib()}
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        columns["device_peak_gib"] = statistics["peak_bytes_in_use"] / GIB
    return columns
