"""The contenders of the PyTorch worker on a GPU, the yardsticks. Each function returns contenders and facts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.sizes import step_config, steps_in_a_round
from benchmarks.jax_side import Prepared
from benchmarks.sizes import train_labels
from benchmarks.torch_side import deepseek_training
from jaxllm.config import TrainConfig
from torch_ref import CustomLLM
from torch_ref.step import make_optimizer, make_schedule, train_step

RESERVED = 20 * 2**30
"""Bytes of the step that do not grow with a micro-batch: float32 weights, gradients and two moments, and libraries."""


def device_of(quick: bool) -> torch.device:
    """The GPU, or with `quick` the CPU; raises a RuntimeError if PyTorch cannot use a GPU."""
    if quick:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU")
    return torch.device("cuda")


def reference_steps(quick: bool) -> Prepared:
    """The step of `torch_ref` under torch.compile and bfloat16 autocast, with fused AdamW."""
    config, device = step_config(quick, remat=False), device_of(quick)
    torch.manual_seed(0)
    with device:
        model = CustomLLM(config.model).train()
    # with `quick` the graph is captured as a whole too, but not compiled: that takes a minute
    model.compile(fullgraph=True, backend="eager" if quick else "inductor")
    optimizer = make_optimizer(model, config, fused=True)
    schedule = make_schedule(optimizer, config)

    def step(labels: Tensor) -> Tensor:
        return train_step(model, optimizer, schedule, config, labels).loss

    return _prepared(step, model, _labels(config, device, rows_that_fit(config, device)), quick)


def deepseek_steps(quick: bool) -> Prepared:
    """The step of transformers' DeepSeek-V3 with `grouped_mm` experts, bfloat16 autocast and fused AdamW."""
    config, device = step_config(quick, remat=False), device_of(quick)
    model, step = deepseek_training(config, device)
    model.set_experts_implementation("grouped_mm")
    return _prepared(
        lambda labels: step(labels, config.precision), model, _labels(config, device, config.data.batch_size), quick
    )


def rows_that_fit(config: TrainConfig, device: torch.device) -> int:
    """Rows of a micro-batch of `torch_ref`, which keeps the attention weights of every layer, in float32 and bfloat16.

    Trying larger ones would compile each of them.
    """
    rows = config.data.batch_size
    if device.type != "cuda":
        return rows
    m, free = config.model, torch.cuda.mem_get_info()[0] - RESERVED
    row = m.num_hidden_layers * m.num_attention_heads * config.data.seq_len**2 * (4 + 2)
    while rows > 1 and rows * row > free / 2:  # the other half: logits, experts, what the backward pass adds
        rows //= 2
    return rows


def _labels(config: TrainConfig, device: torch.device, rows: int) -> Tensor:  # (A,B,T), B = rows
    labels = torch.from_numpy(train_labels(config)).long().to(device)
    return labels.reshape(-1, rows, config.data.seq_len)


def _prepared(step: Callable[[Tensor], Tensor], model: torch.nn.Module, labels: Tensor, quick: bool) -> Prepared:
    """The contender, warm; micro-batches are halved until they fit."""
    first, labels = _first_that_fits(step, model, labels)
    steps = steps_in_a_round(quick)
    facts = {"micro_batches": len(labels), "first_loss": first}

    def go() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(steps):
            loss = step(labels)
        figures = {"loss": float(loss), "seconds": (time.perf_counter() - started) / steps}
        return figures | ({"peak": torch.cuda.max_memory_allocated()} if labels.is_cuda else {})

    return {"step": go}, facts


def _first_that_fits(step: Callable[[Tensor], Tensor], model: torch.nn.Module, labels: Tensor) -> tuple[float, Tensor]:
    """The loss of the first step, and its labels (A,B,T) in micro-batches that fit; (1,B,T) first.

    Raises:
        torch.OutOfMemoryError: not even one row does.
    """
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
