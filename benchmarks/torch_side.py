"""The contenders of the PyTorch worker, the yardsticks. Each function returns contenders and facts about them."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from benchmarks import sizes
from benchmarks.worker import Prepared, repeated, sustained
from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.model.flops import active_parameters
from jaxllm.run.throughput import GIB, host_peak_gib
from jaxllm.store.checkpoint import Weights
from jaxllm.train.state import init_state
from parity_tests.forward import random_weights, torch_model
from parity_tests.hf_side import stock_model
from torch_ref import CustomLLM
from torch_ref.generate import generate
from torch_ref.step import StepMetrics, expert_load, make_optimizer, make_schedule, tokens_per_expert, train_step

# bytes of a GPU's step that do not grow with a micro-batch: weights, gradients and two moments, and libraries
RESERVED = 20 * 2**30

Launch = Callable[[Tensor], StepMetrics]  # of a step on labels (A,B,T)


class TorchLearner:
    """A model that `torch_ref.step` trains; the routing bias moves too."""

    def __init__(self, config: TrainConfig, model: Any, fused: bool | None = True):
        """`fused`: whether AdamW is one kernel; None: PyTorch's choice."""
        self._config, self.model = config, model.train()
        self._runs = {precision: config.with_options(precision=precision) for precision in sizes.PRECISIONS}
        self._optimizer = make_optimizer(model, config.optim, config.precision, fused=fused)
        self._schedule = make_schedule(self._optimizer, config.schedule, config.optim.learning_rate)
        total = sum(p.numel() for p in model.parameters())
        self.sizes = {"parameters": total, "active_parameters": sum(active_parameters(config.model).values())}

    def step(self, labels: Any, precision: str | None = None) -> StepMetrics:
        """One optimizer step on labels (A,B,T)."""
        run = self._runs[precision or self._config.precision]
        return train_step(
            self.model, self._optimizer, self._schedule, run.optim, run.precision, torch.as_tensor(labels).long()
        )

    def expert_load(self, metrics: StepMetrics) -> float:
        """Tokens of the fullest expert over the mean, in the worst layer, of a step."""
        chosen = metrics.experts.swapaxes(0, 1)
        return expert_load(tokens_per_expert(list(chosen), self._config.model.n_routed_experts))

    @torch.no_grad()
    def loss(self, rows: np.ndarray) -> float:
        """Mean cross-entropy of rows (n,T), in nats per token; n is a multiple of the batch size."""
        batches = torch.from_numpy(rows).long().split(self._config.data.batch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._config.precision == "bfloat16"):
            return float(np.mean([float(self.model(batch, labels=batch).loss) for batch in batches]))


def shared_model(config: ModelConfig) -> CustomLLM:
    """`torch_ref`'s model with the same weights as in the JAX worker; the routing bias is zero, as in a new run."""
    model = torch_model(config, random_weights(config))
    for layer in model.decoder_layers:
        layer.mlp.routing_bias.zero_()
    return model


def stock_learner(config: TrainConfig, experts: str = "eager", device: str = "cpu") -> TorchLearner:
    """transformers' DeepSeek-V3 with the sizes of a config, from new weights."""
    config = config.with_options(model=sizes.family_model(config.model))
    weights = Weights(*jax.jit(lambda: init_state(config.model, config.optim, config.seed)[:2])())
    model = stock_model(config.model, weights).to(device)
    model.set_attn_implementation("sdpa")  # what transformers chooses by itself
    model.set_experts_implementation(experts)
    return TorchLearner(config, model)


def reference_steps(
    size: str, quick: bool, precisions: list[str], compiled: bool = False, on_gpu: bool = False
) -> Prepared:
    """The training step of `torch_ref`: with the weights of the JAX worker; on a GPU with new ones, and fused AdamW."""
    config, rows = sizes.STEPS[size](quick), None
    if on_gpu:
        with torch.device(_device(on_gpu)):
            model, rows = CustomLLM(config.model), rows_that_fit(config)
    else:
        model = shared_model(config.model)
    if compiled:  # with `quick` the graph is captured as a whole too, but not compiled: that takes a minute
        model.compile(fullgraph=True, backend="eager" if quick else "inductor")
    learner = TorchLearner(config, model, fused=on_gpu or None)
    launches = {precision: partial(learner.step, precision=precision) for precision in precisions}
    return _steps(learner, launches, size, quick, rows)


def stock_steps(size: str, quick: bool, precisions: list[str], experts: list[str], on_gpu: bool = False) -> Prepared:
    """The training step of transformers' DeepSeek-V3 with fused AdamW, in each precision with each kind of experts."""
    learner = stock_learner(sizes.STEPS[size](quick), device=_device(on_gpu))

    def launch(labels: Tensor, precision: str, kind: str) -> StepMetrics:
        learner.model.set_experts_implementation(kind)
        return learner.step(labels, precision)

    forms = itertools.product(precisions, experts)
    launches = {f"{precision} {kind}": partial(launch, precision=precision, kind=kind) for precision, kind in forms}
    return _steps(learner, launches, size, quick)


def _device(on_gpu: bool) -> str:
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU")
    return "cuda" if on_gpu else "cpu"


def rows_that_fit(config: TrainConfig) -> int:
    """Rows of a micro-batch of `torch_ref`, which keeps all attention weights: each larger one would be compiled."""
    m, rows, free = config.model, config.data.batch_size, torch.cuda.mem_get_info()[0] - RESERVED
    row = m.num_hidden_layers * m.num_attention_heads * config.data.seq_len**2 * (4 + 2)  # float32 and bfloat16
    while rows > 1 and rows * row > free / 2:  # the other half: logits, experts, what the backward pass adds
        rows //= 2
    return rows


def _steps(
    learner: TorchLearner, launches: dict[str, Launch], size: str, quick: bool, rows: int | None = None
) -> Prepared:
    """Contenders that launch a step on the labels, in micro-batches of `rows` (None: those of the config) that fit."""
    labels = torch.from_numpy(sizes.step_labels(sizes.STEPS[size](quick))).long().to(learner.model.device)
    if rows:
        labels = labels.reshape(-1, rows, labels.shape[-1])
    first, labels = first_that_fits(lambda labels: next(iter(launches.values()))(labels).loss, learner.model, labels)

    def figures(metrics: StepMetrics) -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated() if metrics.loss.is_cuda else int(GIB * host_peak_gib())
        return {"loss": float(metrics.loss), "peak": peak}

    turn = sizes.steps_in_a_turn(size, quick)
    contenders = {name: sustained(partial(launch, labels), turn, figures) for name, launch in launches.items()}
    return contenders, {"sizes": learner.sizes, "first_loss": first, "micro_batches": len(labels)}


def first_that_fits(step: Callable[[Tensor], Tensor], model: torch.nn.Module, labels: Tensor) -> tuple[float, Tensor]:
    """The loss of the first step, and its labels (A,B,T) in micro-batches that fit; an OutOfMemoryError if none do."""
    while True:
        try:
            return float(step(labels)), labels
        except torch.OutOfMemoryError:
            if labels.shape[1] == 1:
                raise
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # else the peak would be that of the step that did not fit
        labels = labels.reshape(2 * len(labels), -1, labels.shape[2])


def products(quick: bool) -> Prepared:
    """Bfloat16 products of square matrices."""
    pairs = {n: torch.randn(2, n, n).bfloat16() for n in sizes.peak_sizes(quick)}
    return {f"product {n}": repeated(partial(torch.matmul, *pair), quick) for n, pair in pairs.items()}, {}


def decoding(name: str, work: dict[str, list[int]], quick: bool) -> Prepared:
    """The work of `jax_side.decoding`, with weights in the same precision; and a sum over more than the caches hold."""
    config = sizes.decode_model(name, quick)
    model = shared_model(config)
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    numbers = torch.ones(2**20 if quick else 2**28)
    contenders = {
        f"{key} {p}": partial(generate, model, sizes.decode_prompts(config, rows, prompt), new)
        for key, (rows, prompt, new) in work.items()
        for p, model in models.items()
    }
    return contenders | {"read": numbers.sum}, {"read_bytes": numbers.nbytes}
