"""The contenders of the JAX worker. Each function returns contenders and facts about them."""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.sizes import (
    NARROW,
    PRECISIONS,
    MixtureSizes,
    decode_model,
    decode_prompts,
    peak_sizes,
    train_config,
    train_labels,
)
from benchmarks.worker import Contender, repeated
from jaxllm.config import ModelConfig, TrainConfig, preset
from jaxllm.data.stream import POOL_ROWS, Position
from jaxllm.generate import generate, prefill
from jaxllm.model import flops
from jaxllm.model.decoder import CustomLLM, abstract_model, count_parameters
from jaxllm.model.inference import for_inference
from jaxllm.model.kernels import choose_kernels
from jaxllm.model.kernels.dispatch import plan_dispatch
from jaxllm.model.kernels.expert_ffn import expert_ffn, expert_slice
from jaxllm.model.kernels.matmul import linear
from jaxllm.model.kernels.swiglu import plain_swiglu
from jaxllm.model.layers import stack
from jaxllm.model.moe import DeepSeekExpertLayer, route
from jaxllm.run.checkpoint_writer import CheckpointWriter
from jaxllm.run.history import History
from jaxllm.train.state import init_state, start_state
from jaxllm.train.step import model_graph, train_step

Array = jax.Array
Prepared = tuple[dict[str, Contender], dict[str, Any]]


def shared_weights(config: ModelConfig) -> tuple[Any, Any]:
    """The same parameters and routing bias as in the PyTorch worker; the bias is zero, as in a new run."""
    from parity_tests.forward import random_weights  # here, because it imports PyTorch, which the memory row must not

    params, routing_bias = jax.tree.map(jnp.array, tuple(random_weights(config)))
    return params, jax.tree.map(jnp.zeros_like, routing_bias)


def train_steps(quick: bool, peak: bool = False) -> Prepared:
    """The training step in both precisions, on one state; with `peak`, also matrix products."""
    config = train_config(quick)
    held = [start_state(config, *shared_weights(config.model))]
    labels = jnp.asarray(train_labels(config))

    def contender(precision: str) -> Contender:
        run = config.with_options(precision=precision)
        step = jax.jit(functools.partial(train_step, run, model_graph(run)), donate_argnums=0)

        def go() -> dict[str, float]:
            held[0], metrics = jax.block_until_ready(step(held[0], labels))
            return {"loss": float(metrics.loss)}

        return go

    contenders = {precision: contender(precision) for precision in ("float32", "bfloat16")}
    if peak:
        contenders |= {f"XLA's product {n}": matrix_product(n, quick) for n in peak_sizes(quick)}
    return contenders, sizes_of(config.model, count_parameters(held[0].params))


def saving_steps(quick: bool) -> Prepared:
    """Steps of the default run with and without a checkpoint, and the checkpoint's bytes written to a file."""
    config = TrainConfig()
    if quick:
        model = dataclasses.replace(config.model, **NARROW)
        config = config.with_options(model=model, batch_size=2, seq_len=32)
    steps = 4 if quick else 25
    labels = np.random.default_rng(1).integers(
        config.model.vocab_size, size=(1, config.data.batch_size, config.data.seq_len), dtype=np.int32
    )
    step = jax.jit(functools.partial(train_step, config, model_graph(config)), donate_argnums=0)
    held = [step(init_state(config), labels)[0]]
    folder = tempfile.TemporaryDirectory()  # the contenders keep it; it is removed when the worker ends
    checkpoints = CheckpointWriter(Path(folder.name), keep=1)
    position = Position({"pass": 0}, 0, np.zeros(0, np.int32), np.zeros((POOL_ROWS, config.data.seq_len), np.int32))

    def go(saves: bool) -> dict[str, float]:
        blocked = 0.0
        for number in range(steps):
            held[0], metrics = step(held[0], labels)
            metrics.loss.block_until_ready()
            if saves and number == 0:
                asked = time.perf_counter()
                checkpoints.save(int(held[0].step), held[0], [position.to_bytes()], History())
                blocked = time.perf_counter() - asked
        if saves:
            checkpoints.wait()
        return {"blocked": blocked}

    def write() -> dict[str, float]:
        content = os.urandom(size)
        started = time.perf_counter()
        with (Path(folder.name) / "bytes").open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        return {"seconds": time.perf_counter() - started}

    go(saves=True)
    size = sum(file.stat().st_size for file in Path(folder.name, "checkpoints").rglob("*") if file.is_file())
    contenders = {"saved": lambda: go(True), "plain": lambda: go(False), "written": write}
    return contenders, {"steps": steps, "bytes": size}


def matrix_product(n: int, quick: bool) -> Contender:
    """Float32 products of (n,n) matrices."""
    a, b = jax.random.normal(jax.random.key(0), (2, n, n))
    product = jax.jit(jnp.matmul)
    return repeated(lambda: product(a, b).block_until_ready(), quick)


def sizes_of(config: ModelConfig, total: int) -> dict[str, Any]:
    """The number of parameters, and of those that a token uses; embedding tables count in full."""
    return {"parameters": total, "active_parameters": sum(flops.active_parameters(config).values())}


def mixtures(cases: list[tuple[list[int], str]]) -> Prepared:
    """Contenders of several cases, each a `MixtureSizes` and a compute dtype; names begin with the case's index."""
    made = [mixture(MixtureSizes(*sizes), jnp.dtype(dtype)) for sizes, dtype in cases]
    return {f"{i} {name}": go for i, contenders in enumerate(made) for name, go in contenders.items()}, {}


def mixture(s: MixtureSizes, dtype: jnp.dtype) -> dict[str, Contender]:
    """Forward and backward pass of the routed experts, and of k dense experts with the same number of FLOPs.

    `random` sends each token to k random experts; `skewed` sends all tokens to the same k. Weights are
    float32 masters, cast at each product as in training.
    """
    config = dataclasses.replace(
        preset("customllm-1b"),
        hidden_size=s.hidden,
        num_attention_heads=1,
        moe_intermediate_size=s.expert_hidden,
        n_routed_experts=s.experts,
        num_experts_per_tok=s.per_token,
    )
    graph, weights = nnx.split(
        stack(lambda rngs: DeepSeekExpertLayer(config, dtype=dtype, rngs=rngs), s.experts, "expert", nnx.Rngs(0))
    )
    kernels = choose_kernels(config, dtype).routed
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (s.tokens, s.hidden), dtype)
    d_out = jax.random.normal(keys[1], x.shape, dtype)
    router = 0.02 * jax.random.normal(keys[2], (s.hidden, s.experts))
    rng = np.random.default_rng(0)
    random = np.stack([rng.permutation(s.experts)[: s.per_token] for _ in range(s.tokens)])
    skewed = np.tile(np.arange(s.per_token), (s.tokens, 1))

    def routed(weights, router: Array, x: Array, experts: Array) -> Array:  # (N,D), (N,k) -> (N,D)
        routing = route(x, router, jnp.zeros(s.experts), s.per_token, experts)
        plan, masters = plan_dispatch(routing.experts, s.experts), nnx.merge(graph, weights).weights()
        return expert_ffn(kernels, x, routing.gates, plan, expert_slice(kernels, masters, dtype)).output

    def dense(weights, router: Array, x: Array, experts: None) -> Array:  # (N,D) -> (N,D)
        layers = nnx.merge(graph, weights)
        gate, up, down = (w.weight[...] for w in (layers.gate_proj, layers.up_proj, layers.down_proj))
        return sum(linear(plain_swiglu(linear(x, gate[j]), linear(x, up[j])), down[j]) for j in range(s.per_token))

    def contender(function, weights, experts: Array | None) -> Contender:
        @jax.jit
        def both_ways(weights, router: Array, x: Array, d_out: Array, experts: Array | None):
            out, back = jax.vjp(lambda *inputs: function(*inputs, experts), weights, router, x)
            return out, back(d_out)

        def go() -> None:
            jax.block_until_ready(both_ways(weights, router, x, d_out, experts))

        return go

    few = jax.tree.map(lambda leaf: leaf[: s.per_token], weights)  # no gradients for the other experts
    return {
        "random": contender(routed, weights, jnp.asarray(random, jnp.int32)),
        "skewed": contender(routed, weights, jnp.asarray(skewed, jnp.int32)),
        "dense": contender(dense, few, None),
    }


def compilations(quick: bool) -> Prepared:
    """Trace, lower and compile the training step of a deep and of a shallow model, without a cache."""
    jax.config.update("jax_enable_compilation_cache", False)

    def contender(layers: int) -> Contender:
        config = train_config(quick)
        config = config.with_options(model=dataclasses.replace(config.model, num_hidden_layers=layers))
        graph, state = model_graph(config), jax.eval_shape(functools.partial(init_state, config))
        labels = jax.ShapeDtypeStruct(train_labels(config).shape, jnp.int32)

        def go() -> None:
            jax.clear_caches()
            jax.jit(functools.partial(train_step, config, graph), donate_argnums=0).lower(state, labels).compile()

        return go

    return {f"{layers} layers": contender(layers) for layers in (2, 24)}, {}


def full_size(quick: bool) -> Prepared:
    """Full training steps of customllm-1b with rematerialization, from initialization; `peak` is in bytes."""
    config = train_config(quick, layers=24).with_options(remat=True)
    state = jax.block_until_ready(jax.jit(functools.partial(init_state, config))())
    step = jax.jit(functools.partial(train_step, config, model_graph(config)), donate_argnums=0)
    held, labels = [state], jnp.asarray(train_labels(config))

    def go() -> dict[str, float]:
        held[0], metrics = jax.block_until_ready(step(held[0], labels))
        return {"loss": float(metrics.loss), "peak": peak_memory()}

    facts = sizes_of(config.model, count_parameters(state.params))
    return {"step": go}, {**facts, "peak_after_init": peak_memory()}


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decoding(name: str, work: dict[str, list[int]], quick: bool) -> Prepared:
    """Greedy decoding of rows after a prompt, the pass over the prompt included, in both precisions.

    `work` has rows, tokens of the prompt and new tokens of each contender.
    """
    config = decode_model(name, quick)
    weights = shared_weights(config)
    masters = (nnx.merge(abstract_model(config, dtype=jnp.dtype(p))[0], *weights) for p in PRECISIONS)
    models = {p: for_inference(model) for p, model in zip(PRECISIONS, masters, strict=True)}

    def contender(model: CustomLLM, rows: int, prompt: int, new: int) -> Contender:
        ids = decode_prompts(config, rows, prompt)

        def go() -> None:
            generate(model, ids, new)

        return go

    contenders = {f"{key} {p}": contender(model, *sizes) for key, sizes in work.items() for p, model in models.items()}
    return contenders, {"cache_bytes": cache_bytes(models["float32"])}


def cache_bytes(model: CustomLLM) -> float:
    """Cache bytes per token over all layers, from the shapes of a prefill."""
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    _, cache = jax.eval_shape(lambda ids: prefill(model, ids, 0), tokens)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / tokens.size
