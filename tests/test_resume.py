"""A run that is stopped and resumed equals the uninterrupted one, bit for bit, log included."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from jaxllm.run.evaluation import Evaluator
from jaxllm.run.metrics import RunLog
from tests.fingerprint import fingerprint

# Nothing divides anything: means over several steps, evaluations and checkpoints all fall between one another.
OPTIONS = [
    "--steps", "11", "--log-every", "3", "--eval-every", "4", "--save-every", "5", "--keep-checkpoints", "9",
    "--model.dropout", "0.1", "--grad-accum", "2", "--sample-tokens", "0",
]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "mesh"), [("folder", ""), pytest.param("jsonl", "data=2,fsdp=2", marks=pytest.mark.slow)]
)
def test_n_steps_and_n_more_equal_2n(data, mesh, narrow_model, corpus, tmp_path):
    arguments, source = [*narrow_model, *OPTIONS, "--mesh", mesh], corpus
    if data == "jsonl":
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in sorted(corpus.iterdir())))
    arguments += ["--data", str(source)]
    calm, resumed = tmp_path / "calm", tmp_path / "resumed"
    assert train.main([*arguments, "--run-dir", str(calm)]) == 0
    shutil.copytree(calm, resumed)
    for step in (11, 10):  # as if it had been killed after step 5, with later lines in its log
        shutil.rmtree(resumed / "checkpoints" / str(step))
    assert train.main([*arguments, "--run-dir", str(resumed)]) == 0
    assert fingerprint(resumed) == fingerprint(calm)


@pytest.mark.slow
def test_the_newest_the_regular_and_the_best_checkpoints_are_kept(narrow, tmp_path, monkeypatch):
    evaluate = Evaluator.__call__

    def best_at_8(evaluator, state, epoch, step, interrupted):
        return evaluate(evaluator, state, epoch, step, interrupted) | {"eval_loss": abs(step - 8.0)}

    def interrupting(log, record):
        write(log, record)
        if record["step"] == 11:
            raise KeyboardInterrupt

    write = RunLog.write
    monkeypatch.setattr(Evaluator, "__call__", best_at_8)
    options = ["--save-every", "2", "--eval-every", "4", "--keep-checkpoints", "2", "--keep-every", "6"]
    run = tmp_path / "run"
    arguments = [*narrow, *options, "--sample-tokens", "0", "--run-dir", str(run)]
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", interrupting)
        assert train.main(arguments) == 130
    assert train.main(arguments) == 0  # the best checkpoint before a resume is known after it
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [6, 8, 12, 18, 20]


@pytest.mark.slow
def test_a_resume_prints_only_its_progress_on_stderr(run, narrow, tmp_path):
    """In a separate process, where the libraries' log messages reach the terminal."""
    folder = shutil.copytree(run, tmp_path / "run")
    command = [sys.executable, "train.py", *narrow, "--steps", "21", "--sample-tokens", "0", "--run-dir", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Resuming from step 20" in done.stdout
    assert [line for line in re.split(r"[\r\n]", done.stderr) if line.strip() and "step" not in line] == []
