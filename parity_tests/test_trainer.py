"""The PyTorch Trainer: it computes the steps of JAX, resumes, and refuses what would change the numbers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import torch_ref.model
import torch_ref.train
import train
from jaxllm.config import RunConfig, TrainConfig
from jaxllm.data.sources import open_source
from jaxllm.data.stream import POSITION_FILE, TokenStream
from jaxllm.model.decoding import generate as generate_in_jax
from jaxllm.run.arguments import parse_args
from jaxllm.run.evaluation import Evaluator
from jaxllm.run.metrics import RunLog
from jaxllm.run.prepare import Prepared, prepare
from jaxllm.store.checkpoint import Weights
from jaxllm.store.folder import DATA_REPORT
from jaxllm.store.lock import FolderLock
from jaxllm.store.metrics_file import read_metrics
from jaxllm.train.state import TrainState
from jaxllm.train.step import StepMetrics
from jaxllm.train.trainer import Trainer
from parity_tests.forward import torch_model
from torch_ref.callbacks import MPSCallback, TextGenerationCallback
from torch_ref.generate import generate
from torch_ref.model import MultiHeadLatentAttention
from torch_ref.trainer import CustomLLMTrainer

# Accumulation, warm-up and cosine, clipping at a norm below most gradient norms, decay, routing bias; no dropout.
EVERYTHING = (
    "--steps", "30", "--grad-accum", "2", "--warmup-steps", "10", "--max-grad-norm", "1.0", "--weight-decay", "0.1",
    "--bias-update-rate", "1e-3", "--balance-loss", "0.01", "--router-z-loss", "0.001", "--eval-every", "30",
    "--save-every", "30", "--sample-tokens", "0",
)  # fmt: skip

LOSS_TOLERANCE = 1e-5  # relative; float32 gives 2e-7 on two cores
NORM_TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These models are too small for several threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lines(folder: Path, key: str) -> list[dict]:
    return [record for record in read_metrics(folder) if key in record]


def without_times(records: list[dict]) -> list[dict]:
    measured = ("second", "runtime", "mfu", "data_wait", "peak")
    return [{k: v for k, v in r.items() if not any(part in k for part in measured)} for r in records]


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def torch_run(narrow, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "torch"
    assert torch_ref.train.main([*narrow, "--warmup-steps", "5", "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def again(narrow, torch_run, tmp_path) -> tuple[Path, list[str]]:
    """A copy of `torch_run`, and the arguments that resume it."""
    folder = Path(shutil.copytree(torch_run, tmp_path / "again"))
    return folder, [*narrow, "--warmup-steps", "5", "--run-dir", str(folder)]


# ---- the numbers


class Reference:
    """The JAX step on the data of train.py: its initial weights, and the metrics of steps from them."""

    def __init__(self, prepared: Prepared):
        self.prepared, self.config = prepared, prepared.config
        self.trainer = Trainer(self.config.as_type(TrainConfig))
        self.first = self.trainer.init()

    def steps(self, count: int) -> tuple[TrainState, StepMetrics]:
        """The state after `count` steps, and their metrics: (count,) float64 each."""
        config, state, measured = self.config, jax.tree.map(jnp.copy, self.first), []  # a step deletes its state
        stream = TokenStream(open_source(config.data, config.seed), self.prepared.tokenizer, config.data, config.seed)
        for _ in range(count):
            rows = stream.next_rows(config.data.grad_accum * config.data.batch_size)
            state, metrics = self.trainer.step(state, rows)
            measured.append(metrics)
        return state, StepMetrics(*(np.asarray(column, np.float64) for column in zip(*measured, strict=True)))


@pytest.fixture(scope="module")
def reference(narrow, tmp_path_factory) -> Reference:
    folder = tmp_path_factory.mktemp("runs") / "reference"
    config = parse_args([*narrow, *EVERYTHING, "--run-dir", str(folder)], "test", None, RunConfig)
    with FolderLock(folder) as lock:
        return Reference(prepare(config, "JAX", lock))


class TrainerRun:
    """A run of the Trainer from the weights and on the data of the reference: its unrounded log, and the model."""

    def __init__(self, reference: Reference, folder: Path, steps: int):
        folder.mkdir()
        config = reference.config.with_options(run_dir=folder, steps=steps)
        self._history: list[dict] = []
        first = jax.device_get(Weights(reference.first.params, reference.first.routing_bias))
        log = CustomLLMTrainer.log

        def recorded(trainer: CustomLLMTrainer, logs: dict, start_time: float | None = None) -> None:
            log(trainer, logs, start_time)
            self._history.append(dict(logs))

        with mock.patch.object(CustomLLMTrainer, "log", recorded):
            prepared = reference.prepared._replace(config=config, resumes=False)
            self.model = torch_ref.train.train(prepared, torch_model(config.model, first))

    def column(self, name: str) -> np.ndarray:
        return np.asarray([record[name] for record in self._history if name in record])


@pytest.mark.slow  # test_hand_over.py takes the same steps
def test_thirty_steps_of_the_trainer_are_those_of_jax(reference, tmp_path):
    state, ours = reference.steps(30)
    theirs = TrainerRun(reference, tmp_path / "run", 30)
    assert (ours.grad_norm > reference.config.optim.max_grad_norm).sum() > 20  # most steps were clipped
    np.testing.assert_allclose(theirs.column("loss"), ours.loss, rtol=LOSS_TOLERANCE)
    np.testing.assert_allclose(theirs.column("grad_norm"), ours.grad_norm, rtol=NORM_TOLERANCE)
    # JAX evaluates the schedule in float32
    atol = 1e-7 * reference.config.optim.learning_rate
    np.testing.assert_allclose(theirs.column("learning_rate"), ours.learning_rate, rtol=1e-6, atol=atol)

    (routing_bias,) = jax.tree.leaves(state.routing_bias)  # (L,E)
    moved = np.stack([layer.mlp.routing_bias.numpy() for layer in theirs.model.decoder_layers])
    np.testing.assert_allclose(moved, routing_bias, atol=1e-7)
    assert np.abs(routing_bias).max() > 5e-3

    evaluate = Evaluator(reference.trainer, reference.prepared)
    np.testing.assert_allclose(
        theirs.column("eval_loss"), [evaluate(state, 0.0, step=30)["eval_loss"]], rtol=LOSS_TOLERANCE
    )


next_token_loss = torch_ref.model.next_token_loss


def shifted(by: int) -> Callable:
    """The loss on labels that are shifted twice (1) or not at all (-1)."""
    return lambda logits, labels, num_items: next_token_loss(logits, labels.roll(-by, dims=1), num_items)


def mean_of_means(logits: torch.Tensor, labels: torch.Tensor, _num_items: torch.Tensor) -> torch.Tensor:
    return next_token_loss(logits, labels) / 2


def all_labels(_trainer: CustomLLMTrainer, micro_batches: list[dict], _device: torch.device) -> torch.Tensor:
    return sum((micro["labels"] != -100).sum() for micro in micro_batches)


FAULTS = {
    "none": mock.patch.object(torch_ref.model, "next_token_loss", next_token_loss),
    "labels shifted twice": mock.patch.object(torch_ref.model, "next_token_loss", shifted(1)),
    "labels not shifted": mock.patch.object(torch_ref.model, "next_token_loss", shifted(-1)),
    "a mean of means": mock.patch.object(torch_ref.model, "next_token_loss", mean_of_means),
    "first labels counted": mock.patch.object(CustomLLMTrainer, "_get_num_items_in_batch", all_labels),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(n, marks=() if n in ("none", "a mean of means") else pytest.mark.slow) for n in FAULTS]
)
def test_ragged_micro_batches_agree_and_a_fault_is_detected(reference, fault, tmp_path, monkeypatch):
    """If the micro-batches of a step have different numbers of targets, the mean is over all targets."""
    next_rows = TokenStream.next_rows

    def ragged(stream: TokenStream, count: int) -> np.ndarray:
        rows = next_rows(stream, count)
        rows[: count // 2, 12:] = -100
        return rows

    monkeypatch.setattr(TokenStream, "next_rows", ragged)
    with FAULTS[fault]:
        theirs = TrainerRun(reference, tmp_path / "run", 2).column("loss")
    error = np.abs(theirs / reference.steps(2)[1].loss - 1).max()
    assert error < LOSS_TOLERANCE if fault == "none" else error > 10 * LOSS_TOLERANCE


def test_routing_counts_are_not_doubled_by_recomputed_layers(narrow, tmp_path, monkeypatch):
    counted, calls = [], []
    monkeypatch.setattr("torch_ref.callbacks.update_routing_bias", lambda model, counts, rate: counted.append(counts))
    forward = MultiHeadLatentAttention.forward

    def counting(layer, *args, **kwargs):
        calls.append(torch.is_grad_enabled())  # not in evaluation
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(MultiHeadLatentAttention, "forward", counting)
    options = ["--grad-accum", "2", "--batch-size", "2", "--precision", "bfloat16", "--remat", "--steps", "2"]
    options += ["--peak-tflops", "1"]  # in bfloat16 it takes seconds to measure
    assert torch_ref.train.main([*narrow, *options, "--run-dir", str(tmp_path / "run")]) == 0
    assert sum(calls) == 2 * 2 * 2 * 2  # steps, micro-batches, layers: each forward and again in the backward pass
    assert len(counted) == 2
    for counts in counted:
        assert counts.sum(dim=-1).tolist() == [2 * 2 * 16 * 2] * 2  # A*B*T*k in each of two layers
    assert len(lines(tmp_path / "run", "loss")) == 2
    assert (tmp_path / "run" / "samples.md").read_text().count("## ") == 5
    assert load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")["lm_head.weight"].dtype == np.float32


@pytest.mark.slow
def test_bfloat16_and_remat_compute_nearly_the_same(reference, tmp_path):
    """The first losses: equal with recomputed layers, and equal to bfloat16's precision in bfloat16."""
    losses = {}
    for name, options in {"plain": {}, "remat": {"remat": True}, "narrow": {"precision": "bfloat16"}}.items():
        changed = mock.Mock(wraps=reference, first=reference.first, prepared=reference.prepared)
        changed.config = reference.config.with_options(**options)
        losses[name] = TrainerRun(changed, tmp_path / name, 3).column("loss")
    np.testing.assert_array_equal(losses["remat"], losses["plain"])
    error = np.abs(losses["narrow"] / losses["plain"] - 1).max()
    assert 1e-6 < error < 1e-2


@pytest.mark.slow
def test_evaluation_moves_neither_routing_bias_nor_random_state(narrow, tmp_path):
    args = [*narrow, "--model.dropout", "0.1", "--steps", "4", "--sample-tokens", "0"]
    for name, every in (("often", "1"), ("once", "4")):
        assert torch_ref.train.main([*args, "--eval-every", every, "--run-dir", str(tmp_path / name)]) == 0
    assert_same_weights(tmp_path / "often" / "checkpoint-4", tmp_path / "once" / "checkpoint-4")


# ---- the folder, and resuming it


def test_the_folder_and_the_log_are_those_of_train_py(torch_run, run):
    ours, theirs = (sorted(p.name for p in f.iterdir() if "checkpoint" not in p.name) for f in (run, torch_run))
    assert ours == theirs
    assert sorted(path.name for path in torch_run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]
    assert not list(torch_run.rglob("training_args.bin"))
    columns = [[list(record) for record in read_metrics(folder)] for folder in (run, torch_run)]
    columns[0][-1].remove("compile_seconds")  # PyTorch runs eager: nothing is compiled
    columns[0][-1].remove("nonfinite_steps")  # transformers' Trainer skips no step
    assert columns[0] == columns[1]
    epochs = [[(record["step"], record["epoch"]) for record in read_metrics(folder)] for folder in (run, torch_run)]
    assert epochs[0] == epochs[1]
    assert (torch_run / "samples.md").read_text().count("## ") == 5


def test_the_printed_output(again, capsys):
    folder, args = again
    assert torch_ref.train.main([*args, "--steps", "2", "--overwrite", "--log-format", "dict"]) == 0
    out = capsys.readouterr().out
    for part in ("Model parameters: 0.05M", "(0-1): 2 x DecoderLayer(", "tokens in float32 (", "Evaluation loss"):
        assert part in out
    assert [record["step"] for record in lines(folder, "loss")] == [1, 2]
    assert out.count("{'loss'") == 2  # the Trainer's printer is removed
    assert out.count("{'eval_loss'") == out.count("{'train_runtime'") == 1


@pytest.mark.parametrize("only_what_the_converter_writes", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_run_repeats_the_undisturbed_one(torch_run, again, only_what_the_converter_writes, capsys):
    folder, args = again
    shutil.rmtree(folder / "checkpoint-20")
    if only_what_the_converter_writes:
        kept = {"model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", POSITION_FILE}
        for path in (folder / "checkpoint-10").iterdir():
            if path.name not in kept:
                path.unlink()
        (folder / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10, "train_batch_size": 4}')
    assert torch_ref.train.main(args) == 0
    assert "Resuming from step 10" in capsys.readouterr().out
    for key in ("loss", "eval_loss"):
        assert without_times(lines(folder, key)) == without_times(lines(torch_run, key))
    assert_same_weights(folder / "checkpoint-20", torch_run / "checkpoint-20")


@pytest.mark.slow
def test_an_interrupted_run_with_dropout_equals_the_uninterrupted_one(narrow, tmp_path, monkeypatch, capsys):
    args = [*narrow, "--model.dropout", "0.1", "--steps", "8", "--save-every", "3", "--sample-tokens", "0"]
    assert torch_ref.train.main([*args, "--run-dir", str(tmp_path / "whole")]) == 0
    write = RunLog.write

    def interrupting(log: RunLog, record: dict) -> None:
        write(log, record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    args += ["--run-dir", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", interrupting)
        assert torch_ref.train.main(args) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert torch_ref.train.main(args) == 0
    assert without_times(lines(tmp_path / "parts", "loss")) == without_times(lines(tmp_path / "whole", "loss"))
    assert_same_weights(tmp_path / "parts" / "checkpoint-8", tmp_path / "whole" / "checkpoint-8")


def test_a_finished_run_reports_it_and_more_steps_follow_the_new_schedule(again, capsys):
    folder, args = again
    (folder / "samples.md").unlink()
    assert torch_ref.train.main(args) == 0
    assert "pass --steps MORE" in capsys.readouterr().out
    assert (folder / "samples.md").read_text().count("## ") == 5
    assert torch_ref.train.main([*args, "--steps", "21"]) == 0
    assert [record["step"] for record in lines(folder, "loss")] == list(range(1, 22))
    before, after = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (20, 21))
    assert (before["lm_head.weight"] != after["lm_head.weight"]).any()  # the saved rate is 0


def test_a_partly_written_checkpoint_is_skipped(again, torch_run, capsys):
    folder, args = again
    state = folder / "checkpoint-20" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    assert torch_ref.train.main(args) == 0
    assert "Resuming from step 10" in capsys.readouterr().out
    assert_same_weights(folder / "checkpoint-20", torch_run / "checkpoint-20")


# ---- callbacks


def test_the_mps_callback_frees_and_reports_on_mps_and_is_silent_elsewhere(monkeypatch):
    fake = mock.Mock()
    fake.current_allocated_memory.return_value, fake.driver_allocated_memory.return_value = 2**30, 3 * 2**29
    monkeypatch.setattr(torch, "mps", fake)
    callback = MPSCallback()
    for device in ("cpu", "mps"):
        args = SimpleNamespace(device=torch.device(device))
        logs = {"loss": 1.0}
        callback.on_log(args, None, None, logs=logs)
        callback.on_evaluate(args, None, None)
        if device == "cpu":
            assert logs == {"loss": 1.0}
            assert fake.mock_calls == []
    assert logs == {"loss": 1.0, "mps_allocated_gib": 1.0, "mps_driver_gib": 1.5}
    assert fake.empty_cache.call_count == 2


def test_the_text_generation_callback_writes_samples(reference, tmp_path, capsys):
    config = reference.config.with_options(run_dir=tmp_path, sample_tokens=5, prompts=("def f", "x = "))
    model = torch_model(config.model, jax.device_get(Weights(reference.first.params, reference.first.routing_bias)))
    shutil.copy(reference.config.folder / DATA_REPORT, tmp_path)
    TextGenerationCallback(config, reference.prepared.tokenizer).on_train_end(None, None, None, model=model)
    text = (tmp_path / "samples.md").read_text()
    assert "## 'def f'" in text
    assert "## 'x ='" in text
    assert "Generated Text: def f" in capsys.readouterr().out


@pytest.mark.slow
def test_prompts_of_several_lengths_continue_as_in_jax(reference):
    state, _ = reference.steps(3)
    model = torch_model(reference.config.model, jax.device_get(Weights(state.params, state.routing_bias)))
    prompts = [[5], [7, 9, 11, 200, 3], [40, 41, 42]]
    flax = nnx.merge(reference.trainer.graph, state.params, state.routing_bias)
    assert generate(model, prompts, 20) == generate_in_jax(flax, prompts, 20)


# ---- refusals


def refused(arguments: list[str], capsys, *parts: str, main: Callable = torch_ref.train.main) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    message = error[error.rindex("error: ") :]  # a progress bar may precede it
    assert message.count("\n") == 1, error
    for part in parts:
        assert part in message, error


def test_each_framework_refuses_runs_of_the_other_and_names_the_converter(narrow, run, again, capsys):
    refused([*narrow, "--run-dir", str(run)], capsys, "it holds a JAX run", f"convert to-torch {run} OUT --training")
    folder, args = again
    refused(args, capsys, "it holds a PyTorch run", f"python -m convert to-flax {folder} OUT", main=train.main)


def test_options_that_change_the_numbers_and_other_folders_are_refused(again, narrow, tmp_path, capsys):
    folder, args = again
    before = (folder / "metrics.jsonl").read_bytes()
    refused([*args, "--learning-rate", "0.5"], capsys, "learning_rate is 0.5", "leave the option out")
    assert (folder / "metrics.jsonl").read_bytes() == before
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    refused([*narrow, "--run-dir", str(tmp_path / "papers"), "--overwrite"], capsys, "the folder holds something else")
    refused([*narrow, "--preset", "huge"], capsys, "preset is 'huge'")


def test_label_smoothing_is_refused(tmp_path, capsys):
    """transformers' Trainer would score each position on its own input token."""
    with pytest.raises(SystemExit) as ended:
        torch_ref.train.main(["--run-dir", str(tmp_path / "run"), "--label-smoothing-factor", "0.1"])
    assert ended.value.code
    assert "label-smoothing-factor" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unsuitable_device_is_refused_before_anything_is_deleted(again, capsys, monkeypatch):
    folder, args = again
    with monkeypatch.context() as patch:
        patch.setattr("torch_ref.trainer.PartialState", lambda: SimpleNamespace(device=torch.device("cuda:0")))
        patch.setattr("torch_ref.trainer.is_torch_bf16_gpu_available", lambda: False)
        wanted = [*args, "--precision", "bfloat16", "--overwrite"]
        refused(wanted, capsys, "precision is 'bfloat16'", "cuda:0", "--precision float32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused([*args, "--overwrite"], capsys, "WORLD_SIZE is 2")
    assert (folder / "checkpoint-20").is_dir()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", *(pytest.param(n, marks=pytest.mark.slow) for n in ("scheduler.pt", "rng_state.pth"))]
)
def test_nothing_in_a_checkpoint_is_executed(again, name, tmp_path, capsys, monkeypatch):
    _, args = again
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), tmp_path / "again" / "checkpoint-20" / name, pickle_module=pickle)
    refused([*args, "--steps", "21"], capsys, "checkpoint-20 cannot be read")
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_without_its_optimizer_is_refused(again, capsys):
    folder, args = again
    (folder / "checkpoint-20" / "optimizer.pt").unlink()
    refused([*args, "--steps", "21"], capsys, "checkpoint-20 lacks optimizer.pt")


@pytest.mark.parametrize("name", ["model.safetensors", POSITION_FILE])
def test_a_damaged_checkpoint_is_named(again, name, capsys):
    folder, args = again
    file = folder / "checkpoint-20" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused([*args, "--steps", "21"], capsys, "checkpoint-20", "cannot be read")
    file.unlink()
    refused([*args, "--steps", "21"], capsys, "checkpoint-20")


# ---- what each command imports


@pytest.mark.slow  # `.ci/run` trains so in both
@pytest.mark.parametrize(
    ("module", "hidden"), [("torch_ref.train", "jax jaxlib flax optax orbax"), ("train", "torch accelerate")]
)
def test_each_command_runs_without_the_other_framework(narrow, module, hidden, tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", module, *narrow, "--steps", "2", "--run-dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(root / "tests" / "hiding"), "HIDDEN": hidden}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "run", "loss")) == 2
    assert json.loads((tmp_path / "run" / "train_config.json").read_text())["steps"] == 2
