"""A run that changes frameworks equals one that does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import train
from convert.__main__ import main
from jaxllm.config import TrainConfig
from jaxllm.files import read_json
from jaxllm.store.checkpoint import ResumeState, Weights, newest_checkpoint
from jaxllm.store.checkpoint_writer import write_run
from jaxllm.store.metrics_file import read_metrics
from jaxllm.store.source import tokenizer_files
from jaxllm.train.computation import Computation
from parity_tests.training import random_moments
from torch_ref import train as torch_training

STEPS = ("--steps", "40", "--save-every", "20", "--eval-every", "20", "--sample-tokens", "0")


@pytest.fixture(scope="module")
def whole(narrow, tmp_path_factory) -> Path:
    """40 steps in JAX, with a checkpoint at 20."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*narrow, *STEPS, "--model.dropout", "0", "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory) -> Path:
    """The same run, as it was after 20 steps."""
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("runs") / "half"))
    shutil.rmtree(folder / "checkpoints" / "40")
    return folder


def restored(run: Path):
    config = TrainConfig.from_dict(read_json(run / "train_config.json"))
    state, training = newest_checkpoint(run).state(Computation.of(config))
    (position,) = training.positions
    return state, position


LAST_DIGIT = 1.01e-4  # a loss in the log has four decimals, and a difference of 1e-7 may round to another


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run) if "loss" in record}


def evaluations(run: Path) -> dict[int, float]:
    return {record["step"]: record["eval_loss"] for record in read_metrics(run) if "eval_loss" in record}


def assert_same_bits(one, other) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8), err_msg=str(path))


def test_there_and_back_is_bit_exact(half, tmp_path):
    assert main(["to-torch", str(half), str(tmp_path / "torch"), "--training"]) == 0
    assert main(["to-flax", str(tmp_path / "torch"), str(tmp_path / "back")]) == 0
    (state, position), (other, other_position) = restored(half), restored(tmp_path / "back")
    assert np.any(np.asarray(jax.tree.leaves(state.routing_bias)[0]))
    assert_same_bits(state, other)
    assert int(other.step) == int(other.opt_state.count) == 20
    assert position.source == other_position.source
    assert position.drawn == other_position.drawn
    assert_same_bits(position[2:], other_position[2:])


def test_twenty_steps_in_jax_and_twenty_in_pytorch_are_forty_in_jax(whole, half, narrow, tmp_path, capsys):
    folder = tmp_path / "torch"
    assert main(["to-torch", str(half), str(folder), "--training"]) == 0
    assert torch_training.main([*narrow, *STEPS, "--model.dropout", "0", "--run-dir", str(folder)]) == 0
    assert "Resuming from step 20" in capsys.readouterr().out
    ours, theirs = losses(whole), losses(folder)
    assert theirs.keys() == ours.keys() == set(range(1, 41))
    assert [theirs[i] for i in range(1, 21)] == [ours[i] for i in range(1, 21)]  # the log was converted too
    assert [theirs[i] for i in range(21, 41)] == pytest.approx([ours[i] for i in range(21, 41)], abs=LAST_DIGIT)
    assert evaluations(folder)[40] == pytest.approx(evaluations(whole)[40], rel=1e-5)
    # and the final state is the one of the JAX run
    assert main(["to-flax", str(folder), str(tmp_path / "back")]) == 0
    (state, position), (other, other_position) = restored(whole), restored(tmp_path / "back")
    for tree, of_other, limit in (
        (state.params, other.params, 1e-4),
        (state.opt_state.mu, other.opt_state.mu, 1e-3),
        (state.opt_state.nu, other.opt_state.nu, 1e-3),
    ):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(of_other), strict=True):
            assert np.linalg.norm(a - b) <= limit * np.linalg.norm(a)
    np.testing.assert_allclose(*(np.asarray(jax.tree.leaves(s.routing_bias)[0]) for s in (state, other)), atol=1e-7)
    assert_same_bits(position[2:], other_position[2:])


@pytest.mark.slow
def test_a_run_without_its_moments_is_detected(whole, half, narrow, tmp_path):
    """The control of the test above: zero moments change the losses far beyond its tolerance."""
    folder = tmp_path / "torch"
    assert main(["to-torch", str(half), str(folder), "--training"]) == 0
    file = folder / "checkpoint-20" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    for moments in saved["state"].values():
        moments["exp_avg"].zero_()
    torch.save(saved, file)
    assert torch_training.main([*narrow, *STEPS, "--model.dropout", "0", "--run-dir", str(folder)]) == 0
    ours, theirs = losses(whole), losses(folder)
    assert max(abs(theirs[i] / ours[i] - 1) for i in range(21, 41)) > 10 * 2e-5


def test_a_pytorch_run_resumes_in_jax(narrow, tmp_path, capsys):
    options = [*narrow, *STEPS, "--model.dropout", "0"]
    folder = tmp_path / "torch"
    assert torch_training.main([*options, "--run-dir", str(folder)]) == 0
    theirs = losses(folder)
    shutil.rmtree(folder / "checkpoint-40")
    assert main(["to-flax", str(folder), str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert train.main([*options, "--run-dir", str(tmp_path / "run")]) == 0
    assert "Resuming from step 20" in capsys.readouterr().out
    ours = losses(tmp_path / "run")
    assert [ours[i] for i in range(1, 41)] == pytest.approx([theirs[i] for i in range(1, 41)], abs=LAST_DIGIT)


@pytest.mark.slow
def test_a_run_converted_to_pytorch_and_back_resumes_bit_for_bit(whole, half, narrow, tmp_path, capsys):
    assert main(["to-torch", str(half), str(tmp_path / "torch"), "--training"]) == 0
    assert main(["to-flax", str(tmp_path / "torch"), str(tmp_path / "run")]) == 0
    assert train.main([*narrow, *STEPS, "--model.dropout", "0", "--run-dir", str(tmp_path / "run")]) == 0
    assert "Resuming from step 20" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize("damage", ["missing", "shape", "step", "other", "pickle"])
def test_moments_that_do_not_fit_are_refused_in_one_line(half, tmp_path, damage, capsys):
    folder = tmp_path / "torch"
    assert main(["to-torch", str(half), str(folder), "--training"]) == 0
    file = folder / "checkpoint-20" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    if damage == "missing":
        del saved["state"][3]
    elif damage == "shape":
        saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][1:]
    elif damage == "step":
        saved["state"][2]["step"] += 1
    elif damage == "other":
        saved = ["something else"]
    torch.save(saved, file)
    if damage == "pickle":
        file.write_bytes(b"cos\nsystem\n(S'touch exploded'\ntR.")
    capsys.readouterr()
    assert main(["to-flax", str(folder), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "optimizer.pt" in error or "checkpoint-20" in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_converted_is_refused(half, tmp_path, capsys):
    assert main(["to-torch", str(half), str(tmp_path / "out"), "--training", "--dtype", "bfloat16"]) == 2
    assert "dtype is 'bfloat16'" in capsys.readouterr().err
    assert main(["to-torch", str(half), str(tmp_path / "exported")]) == 0
    assert main(["to-flax", str(tmp_path / "exported"), str(tmp_path / "weights")]) == 0
    capsys.readouterr()
    assert main(["to-torch", str(tmp_path / "weights"), str(tmp_path / "out"), "--training"]) == 2
    assert "is not a training run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["to-torch", str(half), str(half / "config.json" / "out"), "--training"]) == 2
    assert "cannot be made" in capsys.readouterr().err
    torch_run = shutil.copytree(half, tmp_path / "without")
    shutil.rmtree(torch_run / "tokenizer")
    assert main(["to-torch", str(torch_run), str(tmp_path / "out"), "--training"]) == 2
    assert "lacks its tokenizer" in capsys.readouterr().err
    for checkpoint in (torch_run / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    shutil.copytree(half / "tokenizer", torch_run / "tokenizer")
    assert main(["to-torch", str(torch_run), str(tmp_path / "out"), "--training"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_a_run_with_muon_is_converted_there_and_back_and_keeps_its_optimizer(half, narrow, tmp_path, capsys):
    """The run of AdamW, with moments as Muon has them."""
    made, folder, back = (tmp_path / name for name in ("made", "torch", "back"))
    config = TrainConfig.from_dict(read_json(half / "train_config.json"))
    state, training = newest_checkpoint(half).state(Computation.of(config))
    config, weights = config.with_options(optimizer="muon"), Weights(state.params, state.routing_bias)
    moments = random_moments(config, weights, count=20)
    rest = ResumeState(moments, state.step, state.dropout_key, training.positions, training.history)
    write_run(made, config.model, weights, (config, rest), tokenizer_files(half / "tokenizer"))
    assert main(["to-torch", str(made), str(folder), "--training"]) == 0
    assert main(["to-flax", str(folder), str(back)]) == 0
    assert_same_bits(restored(made)[0], restored(back)[0])
    assert_same_bits(restored(made)[0].opt_state, moments)
    options = [*narrow, *STEPS, "--model.dropout", "0", "--optimizer", "adamw"]
    for start, run in ((train.main, back), (torch_training.main, folder)):
        capsys.readouterr()
        assert start([*options, "--run-dir", str(run)]) == 2
        assert "optimizer is 'adamw', and the run has 'muon'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_muon_changes_frameworks_both_ways(narrow, tmp_path):
    options = [
        *narrow, "--optimizer", "muon", "--steps", "12", "--save-every", "6", "--eval-every", "12",
        "--sample-tokens", "0", "--model.dropout", "0",
    ]  # fmt: skip
    whole, half, folder, back = (tmp_path / name for name in ("whole", "half", "torch", "back"))
    assert train.main([*options, "--run-dir", str(whole)]) == 0
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "12")
    assert main(["to-torch", str(half), str(folder), "--training"]) == 0
    assert main(["to-flax", str(folder), str(back)]) == 0
    assert torch_training.main([*options, "--run-dir", str(folder)]) == 0
    assert train.main([*options, "--run-dir", str(back)]) == 0
    ours = losses(whole)
    assert losses(back) == ours
    assert list(losses(folder).values()) == pytest.approx(list(ours.values()), abs=LAST_DIGIT)
    assert main(["to-flax", str(folder), str(tmp_path / "again")]) == 0
    for a, b in zip(*(jax.tree.leaves(restored(run)[0].params) for run in (whole, tmp_path / "again")), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)
