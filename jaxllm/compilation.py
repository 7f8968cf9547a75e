"""Compile before the first step, and keep what was compiled for the next process."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.cache import cache_folder
from jaxllm.config import TrainConfig
from jaxllm.data.corpus import one_line
from jaxllm.step import TrainState, eval_step, train_step

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


class Programs(NamedTuple):
    step: Callable  # (state, (A,B,T) labels) -> state, metrics; donates the state
    evaluate: Callable  # (params, routing bias, (B,T) labels) -> summed cross-entropy, targets
    seconds: float  # to trace both and to compile them, or read them from the cache


def compile_programs(config: TrainConfig, graph: nnx.GraphDef, state: TrainState) -> Programs:
    """What a run executes, ready to run on a state like the one given."""
    start = time.perf_counter()
    # By shapes alone: a restored state is bound to its device, a fresh one is not, and the cache would tell them apart.
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)  # (B,T)
    labels = jax.ShapeDtypeStruct((config.grad_accum, *rows.shape), jnp.int32)  # (A,B,T)
    step = jax.jit(functools.partial(train_step, config, graph), donate_argnums=0).lower(state, labels)
    evaluate = jax.jit(functools.partial(eval_step, graph)).lower(state.params, state.routing_bias, rows)
    return Programs(step.compile(), evaluate.compile(), time.perf_counter() - start)
