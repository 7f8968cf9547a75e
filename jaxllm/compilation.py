"""Keep what was compiled for the next process."""

from __future__ import annotations

import sys

import jax

from jaxllm.cache import cache_folder
from jaxllm.data.corpus import one_line

LARGEST_CACHE = 2 * 2**30
"""Bytes; beyond it the programs that were not used for longest make room."""

WORTH_KEEPING = 0.05
"""Seconds that a program takes to compile."""


def use_compilation_cache() -> None:
    """Read compiled programs from the disk, and write them there; what the user configured in JAX goes before.

    JAX's key holds the program, its options, the versions of JAX and XLA and the device with its instruction set.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # JAX_COMPILATION_CACHE_DIR
        return
    try:
        folder = cache_folder("xla")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"Programs are compiled anew in each run: the cache cannot be used ({one_line(error)})", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST_CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
