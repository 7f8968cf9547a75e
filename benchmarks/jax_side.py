"""The contenders of the JAX worker. Each function returns contenders and facts about them."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import sizes
from benchmarks.worker import Contender, Prepared, repeated, sustained
from jaxllm import doctor
from jaxllm.config import ModelConfig, TrainConfig, preset
from jaxllm.data.stream import POOL_ROWS, Position
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import CustomLLM, abstract_model, count_parameters, split_model
from jaxllm.model.decoding import generate, prefill
from jaxllm.model.flops import active_parameters
from jaxllm.model.inference import for_inference
from jaxllm.model.kernels import choose_kernels, describe_kernels
from jaxllm.model.kernels.expert_ffn import expert_ffn, expert_slice
from jaxllm.model.kernels.matmul import linear
from jaxllm.model.kernels.self_check import LIMITS
from jaxllm.model.kernels.swiglu import plain_swiglu
from jaxllm.model.kernels.token_dispatch import plan_dispatch
from jaxllm.model.layers import stack
from jaxllm.model.layout import ONE_DEVICE
from jaxllm.model.moe import DeepSeekExpertLayer, route
from jaxllm.plan.hlo import read_program
from jaxllm.plan.hlo_cost import matrix_products
from jaxllm.plan.report import kernel_totals
from jaxllm.run.hardware import versions
from jaxllm.run.runtime import peak_memory
from jaxllm.run.self_check import failures
from jaxllm.run.throughput import GIB
from jaxllm.store.checkpoint_writer import CheckpointWriter
from jaxllm.store.history import History
from jaxllm.train.computation import Computation
from jaxllm.train.optim import StepNumbers
from jaxllm.train.placement import lower_step
from jaxllm.train.step import StepMetrics

Array = jax.Array


class JaxLearner:
    """What `train.py` trains: one state, with a step compiled for each precision."""

    def __init__(self, config: TrainConfig, precisions: Sequence[str] = (), weights: tuple[Any, Any] | None = None):
        """`precisions`: none is that of the config. `weights`: parameters and routing bias; None: new ones."""
        self._config, started = config, time.perf_counter()
        self._numbers = StepNumbers.of(config.optim, config.schedule)
        runs = {p: config.with_options(precision=p) for p in precisions or (config.precision,)}
        self.programs = {p: lower_step(Computation.of(run), ONE_DEVICE).compile() for p, run in runs.items()}
        self.compile_seconds = time.perf_counter() - started
        computation = Computation.of(config)
        new = jax.jit(computation.init_state)
        self.state = jax.block_until_ready(new() if weights is None else computation.start_state(*weights))
        self._evaluate = jax.jit(computation.eval_step)
        active = sum(active_parameters(config.model).values())
        self.sizes = {"parameters": count_parameters(self.state.params), "active_parameters": active}

    def step(self, labels: np.ndarray, precision: str | None = None) -> StepMetrics:
        """Launch one optimizer step on labels (A,B,T)."""
        program = self.programs[precision or self._config.precision]
        self.state, metrics = program(self.state, TokenBatch(labels), self._numbers)
        return metrics

    def expert_load(self, metrics: StepMetrics) -> float:
        """Tokens of the fullest expert over the mean, in the worst layer, of a step."""
        return float(metrics.expert_load)

    def loss(self, rows: np.ndarray) -> float:
        """Mean cross-entropy of rows (n,T), in nats per token; n is a multiple of the batch size."""
        batches = rows.reshape(-1, self._config.data.batch_size, rows.shape[-1])
        sums = [self._evaluate(self.state.params, self.state.routing_bias, TokenBatch(batch)) for batch in batches]
        return sum(float(nll) for nll, _ in sums) / sum(int(count) for _, count in sums)


def device() -> Prepared:
    """The first device; `memory_gib` is what a program may have of it, None: it does not say."""
    first = jax.devices()[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return {}, {
        "platform": jax.default_backend(),
        "name": first.device_kind,
        "compute_capability": getattr(first, "compute_capability", None),
        "memory_gib": limit and limit / GIB,
        "runtime": " ".join(first.client.platform_version.split()),
        "driver": versions().get("driver"),
    }


def self_check(quick: bool) -> Prepared:
    """The self-check of the kernels of the step, in each precision; `checks` is empty of what cannot be a number."""
    found = {}
    for precision, checks in doctor.self_check(sizes.gpu_config(quick).model).items():
        largest: dict[str, float] = {}
        for check in checks:
            largest[check.kernel] = max(largest.get(check.kernel, 0.0), check.error)
        found[precision] = {"largest": largest, "limit": LIMITS[precision], "failures": failures(checks)}
    return {}, found


def peak_bytes() -> int:
    """The most bytes so far: of device memory, or on a CPU of this process."""
    columns = peak_memory()
    return int(GIB * columns.get("device_peak_gib", columns["host_peak_gib"]))


def shared_weights(config: ModelConfig) -> tuple[Any, Any]:
    """The same parameters and routing bias as in the PyTorch worker; the bias is zero, as in a new run."""
    from parity_tests.forward import random_weights  # here, because it imports PyTorch, which the memory row must not

    params, routing_bias = jax.tree.map(jnp.array, tuple(random_weights(config)))
    return params, jax.tree.map(jnp.zeros_like, routing_bias)


def steps(size: str, quick: bool, precisions: list[str], described: bool = False) -> Prepared:
    """The training step in each precision, on one state; `described`: the facts say how the first was compiled.

    `six layers` start with the weights of the PyTorch worker, other sizes with new ones.
    """
    config = sizes.STEPS[size](quick)
    learner = JaxLearner(config, precisions, shared_weights(config.model) if size == "six layers" else None)
    facts: dict[str, Any] = {"sizes": learner.sizes, "peak_after_init": peak_bytes()}
    labels = sizes.step_labels(config)
    facts["first_loss"] = float(learner.step(labels, precisions[0]).loss)
    if described:
        compiled = learner.programs[precisions[0]]
        memory = compiled.memory_analysis()
        facts |= {
            "compile_seconds": learner.compile_seconds,
            "chosen": describe_kernels(config.model, jnp.dtype(precisions[0])),
            "kernels": kernel_totals(matrix_products(read_program(compiled.as_text()))),
            "memory": {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes},
        }

    def figures(metrics: StepMetrics) -> dict[str, float]:
        jax.block_until_ready(learner.state)
        return {"loss": float(metrics.loss), "peak": peak_bytes()}

    turn = sizes.steps_in_a_turn(size, quick)
    return {p: sustained(partial(learner.step, labels, p), turn, figures) for p in precisions}, facts


def saving_steps(quick: bool) -> Prepared:
    """Steps of the default run with and without a checkpoint, and the checkpoint's bytes written to a file."""
    config, number = sizes.learner_config("adamw", quick), 4 if quick else 25
    learner, labels = JaxLearner(config), sizes.step_labels(config)
    learner.step(labels)
    folder = tempfile.TemporaryDirectory()  # the contenders keep it; it is removed when the worker ends
    checkpoints = CheckpointWriter(Path(folder.name), keep=1)
    position = Position({"pass": 0}, 0, np.zeros(0, np.int32), np.zeros((POOL_ROWS, config.data.seq_len), np.int32))

    def go(saves: bool) -> dict[str, float]:
        blocked = 0.0
        for i in range(number):
            learner.step(labels).loss.block_until_ready()
            if saves and i == 0:
                asked = time.perf_counter()
                checkpoints.save(int(learner.state.step), learner.state, [position.to_bytes()], History())
                blocked = time.perf_counter() - asked
        if saves:
            checkpoints.wait()
        return {"blocked": blocked}

    def write() -> dict[str, float]:
        content, started = os.urandom(size), time.perf_counter()
        with (Path(folder.name) / "bytes").open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        return {"seconds": time.perf_counter() - started}

    go(saves=True)
    size = sum(file.stat().st_size for file in Path(folder.name, "checkpoints").rglob("*") if file.is_file())
    contenders = {"saved": partial(go, True), "plain": partial(go, False), "written": write}
    return contenders, {"steps": number, "bytes": size}


def products(quick: bool) -> Prepared:
    """Float32 products of square matrices."""
    product = jax.jit(jnp.matmul)

    def once(n: int) -> Callable[[], Array]:
        a, b = jax.random.normal(jax.random.key(0), (2, n, n))
        return lambda: product(a, b).block_until_ready()

    return {f"product {n}": repeated(once(n), quick) for n in sizes.peak_sizes(quick)}, {}


def ceilings(quick: bool) -> Prepared:
    """A large product in bfloat16 and passes over a large array; `work` are the FLOPs or bytes of one of them."""
    side, size, repetitions = (256, 2**20, 2) if quick else (8192, 2**28, 20)
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16)
    array = jnp.ones(size, jnp.float32)
    copied = [jnp.array(array)]
    product, add, total = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0), jax.jit(jnp.sum)

    def copy() -> Array:
        copied[0] = add(copied[0])
        return copied[0]

    launches = {"product": partial(product, a, b), "copy": copy, "sum": partial(total, array)}
    contenders = {name: sustained(launch, repetitions, jax.block_until_ready) for name, launch in launches.items()}
    return contenders, {"side": side, "work": {"product": 2 * side**3, "copy": 2 * array.nbytes, "sum": array.nbytes}}


def mixture(shape: list[int], dtype: str) -> Prepared:
    """Forward and backward pass of the routed experts, and of k dense experts with the same number of FLOPs.

    `random` sends each token to k random experts, `skewed` all tokens to the same k. Weights are float32 masters.
    """
    s = sizes.MixtureSizes(*shape)
    config = dataclasses.replace(
        preset(sizes.MODEL), hidden_size=s.hidden, num_attention_heads=1, moe_intermediate_size=s.expert_hidden,
        n_routed_experts=s.experts, num_experts_per_tok=s.per_token,
    )  # fmt: skip
    layer = partial(DeepSeekExpertLayer, config, dtype=jnp.dtype(dtype))
    graph, weights = nnx.split(stack(lambda rngs: layer(rngs=rngs), s.experts, "expert", nnx.Rngs(0)))
    kernels = choose_kernels(config, dtype).routed
    keys = jax.random.split(jax.random.key(1), 3)
    x, d_out = (jax.random.normal(key, (s.tokens, s.hidden), dtype) for key in keys[:2])
    router, rng = 0.02 * jax.random.normal(keys[2], (s.hidden, s.experts)), np.random.default_rng(0)
    random = jnp.asarray([rng.permutation(s.experts)[: s.per_token] for _ in range(s.tokens)], jnp.int32)
    skewed = jnp.tile(jnp.arange(s.per_token, dtype=jnp.int32), (s.tokens, 1))

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

        return lambda: jax.block_until_ready(both_ways(weights, router, x, d_out, experts))

    few = jax.tree.map(lambda leaf: leaf[: s.per_token], weights)  # no gradients for the other experts
    contenders = {
        "random": contender(routed, weights, random),
        "skewed": contender(routed, weights, skewed),
        "dense": contender(dense, few, None),
    }
    return contenders, {}


def compilations(quick: bool) -> Prepared:
    """Trace, lower and compile the training step of a shallow and of a deep model, without a cache."""
    jax.config.update("jax_enable_compilation_cache", False)

    def go(computation: Computation) -> None:
        jax.clear_caches()
        lower_step(computation, ONE_DEVICE).compile()

    model = sizes.train_config(quick).model
    configs = {
        layers: sizes.train_config(quick).with_options(model=dataclasses.replace(model, num_hidden_layers=layers))
        for layers in (2, 24)
    }
    return {f"{layers} layers": partial(go, Computation.of(config)) for layers, config in configs.items()}, {}


def decoding(name: str, work: dict[str, list[int]], quick: bool, precisions: list[str], shared: bool) -> Prepared:
    """Greedy decoding, the prompt included, of `DecodingSizes`; `shared`: with the weights of the PyTorch worker."""
    config = sizes.decode_model(name, quick)
    new_weights = jax.jit(lambda: split_model(CustomLLM(config, rngs=nnx.Rngs(0)))[1:])
    weights = shared_weights(config) if shared else new_weights()
    masters = {p: nnx.merge(abstract_model(config, dtype=jnp.dtype(p))[0], *weights) for p in precisions}
    models = {p: for_inference(masters.pop(p)) for p in precisions}
    contenders = {
        f"{key} {p}": partial(generate, model, sizes.decode_prompts(config, rows, prompt), new)
        for key, (rows, prompt, new) in work.items()
        for p, model in models.items()
    }
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    _, cache = jax.eval_shape(lambda ids: prefill(models[precisions[0]], ids, 0), tokens)
    cached = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return contenders, {"cache_bytes": cached / tokens.size}  # of one token of one row, over all layers
