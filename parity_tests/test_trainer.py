"""The Trainer path of PyTorch against the step of JAX, and what it leaves, resumes and refuses."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import train as jax_side
from jaxllm.checkpoint import Weights
from jaxllm.config import TrainConfig
from jaxllm.data.corpus import open_source
from jaxllm.data.stream import TokenStream
from jaxllm.metrics import read_metrics
from jaxllm.run import parse_args, prepare
from jaxllm.step import init_state, model_graph, train_step
from parity_tests.forward import torch_model
from torch_ref import train as torch_side
from torch_ref import trainer

# Accumulation, warm-up and cosine, clipping at a norm below most gradients', decay, routing bias; no dropout.
EVERYTHING = (
    "--steps", "30", "--grad-accum", "2", "--warmup-steps", "10", "--max-grad-norm", "1.0", "--weight-decay", "0.1",
    "--bias-update-rate", "1e-3", "--eval-every", "30", "--save-every", "30", "--sample-tokens", "0",
)  # fmt: skip


def lines(folder: Path, key: str) -> list[dict]:
    return [record for record in read_metrics(folder) if key in record]


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if "second" not in k and "runtime" not in k} for r in records]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def torch_run(narrow, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "torch"
    assert torch_side.main([*narrow, "--model.dropout", "0.1", "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def dropping(narrow) -> tuple[str, ...]:
    """The arguments of `torch_run`: with dropout, so that a resumed run needs its random state."""
    return (*narrow, "--model.dropout", "0.1")


# ---- the numbers


@dataclasses.dataclass
class Reference:
    """What jaxllm.step computes on the batches of train.py."""

    config: TrainConfig
    start: Weights
    losses: np.ndarray  # (steps,)
    norms: np.ndarray
    rates: np.ndarray
    routing_bias: np.ndarray  # (L,E), at the end
    eval_loss: float
    prepared: tuple


@pytest.fixture(scope="module")
def reference(narrow, tmp_path_factory) -> Reference:
    folder = tmp_path_factory.mktemp("runs") / "reference"
    prepared = prepare(parse_args([*narrow, *EVERYTHING, "--run-dir", str(folder)], "test", None), "JAX")
    config = prepared.config
    graph = model_graph(config)
    state = init_state(config)
    start = jax.device_get(Weights(state.params, state.routing_bias))
    stream = TokenStream(open_source(config), prepared.tokenizer, config.seq_len, config.seed)
    step_fn = jax.jit(functools.partial(train_step, config, graph))
    metrics = []
    for _ in range(config.steps):
        rows = stream.next_rows(config.grad_accum * config.batch_size)
        state, measured = step_fn(state, rows.reshape(config.grad_accum, config.batch_size, config.seq_len))
        metrics.append(measured)
    losses, norms, rates = (
        np.asarray([getattr(m, name) for m in metrics], np.float64) for name in ("loss", "grad_norm", "learning_rate")
    )
    eval_loss = jax_side.Evaluator(config, graph, prepared.held_out)(state, 0.0)["eval_loss"]
    (routing_bias,) = jax.tree.leaves(state.routing_bias)
    return Reference(config, start, losses, norms, rates, np.asarray(routing_bias), eval_loss, prepared)


def by_trainer(reference: Reference, folder: Path) -> tuple[list[dict], np.ndarray]:
    """The Trainer's unrounded log from the same weights on the same data, and the routing bias at its end (L,E)."""
    config = dataclasses.replace(reference.config, run_dir=folder)
    folder.mkdir()
    model = torch_model(config.model, reference.start).train()
    history: list[dict] = []
    with mock.patch.object(trainer.CustomLLMTrainer, "log", recording(history)):
        torch_side.train(config, reference.prepared[1], reference.prepared[2], resumes=False, model=model)
    return history, np.stack([layer.mlp.routing_bias.numpy() for layer in model.decoder_layers])


def recording(history: list[dict]):
    log = trainer.CustomLLMTrainer.log

    def recorded(self, logs, start_time=None):
        log(self, logs, start_time)
        history.append(dict(logs))

    return recorded


def column(history: list[dict], name: str) -> np.ndarray:
    return np.asarray([record[name] for record in history if name in record])


def test_thirty_steps_of_the_trainer_are_those_of_jax(reference, tmp_path):
    history, routing_bias = by_trainer(reference, tmp_path / "run")
    assert (reference.norms > reference.config.max_grad_norm).sum() > 20  # clipping was at work
    print("max relative difference: loss", np.max(np.abs(column(history, "loss") / reference.losses - 1)))
    print("grad_norm", np.max(np.abs(column(history, "grad_norm") / reference.norms - 1)))
    print("eval", abs(column(history, "eval_loss")[0] / reference.eval_loss - 1))
    print("bias", np.abs(routing_bias - reference.routing_bias).max(), np.abs(routing_bias).max())
    print("rate", np.abs(column(history, "learning_rate") - reference.rates).max())
    np.testing.assert_allclose(column(history, "loss"), reference.losses, rtol=1e-5)
    np.testing.assert_allclose(column(history, "grad_norm"), reference.norms, rtol=1e-4)
    # JAX evaluates the schedule in float32
    peak = reference.config.learning_rate
    np.testing.assert_allclose(column(history, "learning_rate"), reference.rates, rtol=1e-6, atol=1e-7 * peak)
    np.testing.assert_allclose(routing_bias, reference.routing_bias, atol=1e-7)
    assert np.abs(routing_bias).max() > 5e-3
    np.testing.assert_allclose(column(history, "eval_loss"), [reference.eval_loss], rtol=1e-5)
