"""The contenders of the JAX worker on a GPU. Each function returns contenders and facts about them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu.sizes import MODEL, PRODUCT, decoding_sizes, step_config, steps_in_a_round
from benchmarks.jax_side import Prepared, cache_bytes
from benchmarks.sizes import decode_model, train_labels
from benchmarks.worker import Contender
from jaxllm.generate import generate
from jaxllm.model.decoder import CustomLLM, abstract_model, split_model
from jaxllm.model.inference import for_inference
from jaxllm.model.kernels import describe_kernels
from jaxllm.model.layout import ONE_DEVICE
from jaxllm.plan.hlo import read_program
from jaxllm.plan.hlo_cost import matrix_products
from jaxllm.plan.report import kernel_totals
from jaxllm.run.throughput import GIB
from jaxllm.train.placement import lower_step
from jaxllm.train.state import init_state
from jaxllm.train.step import model_graph


def device() -> Prepared:
    """The first device; `memory_gib` is what a program may have of it, None: it does not say."""
    first = jax.devices()[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    facts = {
        "platform": jax.default_backend(),
        "name": first.device_kind,
        "compute_capability": getattr(first, "compute_capability", None),
        "memory_gib": limit and limit / GIB,
        "runtime": " ".join(first.client.platform_version.split()),
    }
    return {}, facts


def ceilings(quick: bool) -> Prepared:
    """A large product in bfloat16 and passes over a large array; `work` are the FLOPs or bytes of one of them."""
    side, size, repetitions = (256, 2**20, 2) if quick else (PRODUCT, 2**28, 20)
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16)
    array = jnp.ones(size, jnp.float32)
    copied = [jnp.array(array)]
    product, add, total = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0), jax.jit(jnp.sum)

    def copy() -> jax.Array:
        copied[0] = add(copied[0])
        return copied[0]

    contenders = {
        "product": sustained(lambda: product(a, b), repetitions),
        "copy": sustained(copy, repetitions),
        "sum": sustained(lambda: total(array), repetitions),
    }
    return contenders, {"side": side, "work": {"product": 2 * side**3, "copy": 2 * array.nbytes, "sum": array.nbytes}}


def sustained(launch: Callable[[], jax.Array], repetitions: int) -> Contender:
    """Launch the same work several times without waiting in between; `seconds` are those of one time."""

    def go() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(repetitions):
            result = launch()
        result.block_until_ready()
        return {"seconds": (time.perf_counter() - started) / repetitions}

    return go


def train_steps(quick: bool, remat: bool) -> Prepared:
    """The step that train.py runs; `peak` is the most device memory so far, in bytes, where the device counts it."""
    config = step_config(quick, remat)
    started = time.perf_counter()
    compiled: Any = lower_step(config, model_graph(config), ONE_DEVICE).compile()
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    held = [jax.jit(init_state, static_argnums=0)(config)]
    labels = jnp.asarray(train_labels(config))
    held[0], first = compiled(held[0], labels)
    steps = steps_in_a_round(quick)

    def go() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(steps):
            held[0], metrics = compiled(held[0], labels)
        figures = {"loss": float(metrics.loss), "seconds": (time.perf_counter() - started) / steps}
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return figures if peak is None else figures | {"peak": peak}

    facts = {
        "first_loss": float(first.loss),
        "compile_seconds": compile_seconds,
        "chosen": describe_kernels(config.model, jnp.dtype(config.precision)),
        "kernels": kernel_totals(matrix_products(read_program(compiled.as_text()))),
        "memory": {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes},
    }
    return {"step": go}, facts


def decoding(quick: bool) -> Prepared:
    """Greedy decoding with weights in bfloat16: the first token alone (`first`), and with those after it (`all`)."""
    config = decode_model(MODEL, quick)
    graph, _, _ = abstract_model(config, dtype=jnp.bfloat16)
    weights = jax.jit(lambda: split_model(CustomLLM(config, rngs=nnx.Rngs(0)))[1:])()
    model = for_inference(nnx.merge(graph, *weights))
    del weights
    rng = np.random.default_rng(2)
    contenders: dict[str, Contender] = {}
    for size in decoding_sizes(quick):
        prompts = rng.integers(config.vocab_size, size=(size.batch, size.prompt)).tolist()
        for name, new in (("first", 1), ("all", 1 + size.new)):
            contenders[f"{size.batch} {name}"] = lambda prompts=prompts, new=new: _decoded(model, prompts, new)
    return contenders, {"weight_bytes": 2, "cache_bytes": cache_bytes(model)}


def _decoded(model: CustomLLM, prompts: list[list[int]], new: int) -> None:
    generate(model, prompts, new)
