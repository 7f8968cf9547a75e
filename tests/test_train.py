"""train.py from end to end, on a narrow model: what it writes, resuming, refusing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import train
from jaxllm.metrics import read_metrics

TRAIN_KEYS = ["loss", "grad_norm", "learning_rate", "epoch", "step"]
EVAL_KEYS = ["eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch"]
END_KEYS = ["train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"]


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the narrow run that a test may change."""
    return shutil.copytree(run, tmp_path / "run")


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(folder) if "loss" in record}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_order(keys: list[str], record: dict) -> bool:
    return [key for key in record if key in keys] == keys


def test_the_folder_holds_everything(run):
    assert json.loads((run / "config.json").read_text())["hidden_size"] == 32
    assert json.loads((run / "train_config.json").read_text())["steps"] == 20
    assert (run / "tokenizer" / "tokenizer.json").is_file()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "samples.md").read_text().count("## ") == 5
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"10", "20"}


def test_the_log_has_the_sources_lines_in_its_order(run):
    records = read_metrics(run)
    trained = [record for record in records if "loss" in record]
    evaluated = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in trained] == list(range(1, 21))
    assert [record["step"] for record in evaluated] == [10, 20]
    assert all(in_order(TRAIN_KEYS, record) for record in trained)
    assert all(in_order(EVAL_KEYS, record) for record in evaluated)
    assert in_order(END_KEYS, records[-1])
    assert all(record["tokens_per_second"] > 0 for record in trained)


def test_it_learns_what_no_unigram_model_can(narrow, tmp_path, capsys):
    args = [*narrow, "--steps", "150", "--learning-rate", "1e-2", "--log-every", "50", "--eval-every", "150"]
    assert train.main([*args, "--save-every", "150", "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    final, unigram = map(float, re.search(r"Evaluation loss (\S+) nats.* unigram model has (\S+)", out).groups())
    assert final < 0.6 * unigram
    assert re.search(r"^Model parameters: \d+\.\d\dM$", out, re.MULTILINE)
    assert re.search(r"^CustomLLM\(\n  \(token_embeddings\): Embedding\(300, 32\)$", out, re.MULTILINE)


def test_a_finished_run_says_so(narrow, copied, capsys):
    before = losses(copied)
    assert train.main([*narrow, "--run-dir", str(copied)]) == 0
    assert "The run has its 20 steps: pass --steps MORE" in capsys.readouterr().out
    assert losses(copied) == before


def test_resuming_repeats_the_undisturbed_run_exactly(narrow, run, copied, capsys):
    shutil.rmtree(copied / "checkpoints" / "20")
    assert train.main([*narrow, "--run-dir", str(copied)]) == 0
    assert "Resuming from step 10" in capsys.readouterr().out
    assert losses(copied) == losses(run)
    assert len(losses(copied)) == 20


def test_more_steps_go_on(narrow, run, copied):
    assert train.main([*narrow, "--run-dir", str(copied), "--steps", "23"]) == 0
    assert sorted(losses(copied)) == list(range(1, 24))
    assert {step: loss for step, loss in losses(copied).items() if step <= 20} == losses(run)


def test_the_same_seed_gives_the_same_losses_and_overwrite_starts_anew(narrow, run, copied):
    (copied / "samples.md").write_text("old")
    assert train.main([*narrow, "--run-dir", str(copied), "--overwrite"]) == 0
    assert losses(copied) == losses(run)
    assert (copied / "samples.md").read_text() != "old"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("--learning-rate", "learning_rate", "0.5"),
        ("--seed", "seed", "1"),
        ("--model.moe-intermediate-size", "model.moe_intermediate_size", "16"),
    ],
)
def test_a_changed_field_is_refused_by_name(narrow, copied, capsys, name, field, value):
    before = contents(copied)
    assert train.main([*narrow, "--run-dir", str(copied), name, value]) == 2
    assert capsys.readouterr().err.startswith(f"error: {field} is {value}, but the run in ")
    assert contents(copied) == before


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_that_is_no_run_is_left_alone(narrow, tmp_path, capsys, more):
    (tmp_path / "thesis.txt").write_text("precious")
    assert train.main([*narrow, "--run-dir", str(tmp_path), *more]) == 2
    assert "the folder holds something else" in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.txt": b"precious"}


@pytest.mark.parametrize(
    "options", [["--grad-accum", "4", "--batch-size", "2"], ["--precision", "bfloat16"], ["--remat"]]
)
def test_options_of_the_computation_run(narrow, tmp_path, options):
    args = [*narrow, "--steps", "2", "--sample-tokens", "0", "--run-dir", str(tmp_path / "run"), *options]
    assert train.main(args) == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2]


def test_ctrl_c_ends_with_one_line_and_a_run_that_goes_on(narrow, run, tmp_path, capsys, monkeypatch):
    write = train.RunLog.write

    def interrupting(log, record):
        write(log, record)
        if record["step"] == 12:
            raise KeyboardInterrupt

    args = [*narrow, "--run-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train.RunLog, "write", interrupting)
        assert train.main(args) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert train.main(args) == 0
    assert losses(tmp_path / "run") == losses(run)
