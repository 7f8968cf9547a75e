"""`python -m benchmarks`: every row runs on small sizes and reports; bad input is refused; verdicts are right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.decoding import step_seconds
from benchmarks.finding import Finding, at_least, at_most
from benchmarks.rows import ROWS
from benchmarks.session import Session
from benchmarks.sizes import step_labels, train_config
from benchmarks.timing import Spread, interleave, ratio
from benchmarks.worker import Failure, Run

FEW = ("step-autocast",)  # both sides


@pytest.mark.slow  # `.ci/run` runs the few
@pytest.mark.parametrize("rows", [FEW, (*ROWS,)], ids=["few", "all"])
def test_every_row_runs(rows, tmp_path):
    """In a separate process, as a user starts it."""
    command = [sys.executable, "-m", "benchmarks", *rows, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [row["row"] for row in report["rows"]] == list(rows)
    findings = [finding for row in report["rows"] for finding in row["findings"]]
    assert all(finding["verdict"] == "not judged" for finding in findings)
    assert all(finding["value"]["median"] > 0 for finding in findings)
    lines = {row["row"]: [finding["what"].partition(", ")[2] for finding in row["findings"]] for row in report["rows"]}
    if "decode" in lines:
        assert lines["decode"] == [
            "one row", "one row", "eight rows", "one row, share of the memory's speed",
            "eight rows, share of the memory's speed", "first token after 64", "cache of a token",
        ]  # fmt: skip
    assert (tmp_path / "benchmarks.png").stat().st_size < 300_000
    assert not {"hostname", "node", "path"} & set(report["machine"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["step"], "rows has 'step'"), (["--rounds", "0"], "rounds is 0"), (["--out", __file__], "it must be a folder")],
)
def test_bad_input_is_refused_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_list_names_every_row(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ROWS)


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (lambda session: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda session: [finding(math.nan)], "step: value.median is nan"),
        (lambda session: [finding(1.0, losses={"ours": math.inf})], "step: losses.ours is inf"),
    ],
)
def test_a_row_that_fails_is_a_line_and_the_others_run(fails, reason, tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "memory", ROWS["memory"]._replace(measure=fails))
    monkeypatch.setitem(ROWS, "compile", ROWS["compile"]._replace(measure=lambda session: [finding(2.0)]))
    assert main(["memory", "compile", "--quick", "--out", str(tmp_path)]) == 1
    failed, measured = json.loads((tmp_path / "benchmarks.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert failed["not_measured"] == reason
    assert measured["findings"][0]["value"]["median"] == 2.0


def finding(value: float, **details) -> Finding:
    return Finding("step", "", "", Spread(value, value, value), at_least(1.0), details=details)


def test_a_side_that_cannot_prepare_gives_the_reason():
    with pytest.raises(Failure, match="no_such_function"), Session(True, 1).jax("no_such_function"):
        pass


def test_disturbed_rounds_are_repeated_and_quiet_ones_are_kept():
    loads = iter([1.0, 0.0, 0.5, 0.0])
    runs = interleave({"a": lambda: Run(1.0, 1.0, next(loads), {})}, rounds=2, warmups=0)
    assert [run.other_load for run in runs["a"]] == [0.0, 0.0]


def test_micro_batches_of_the_yardstick_are_one_batch():
    import torch

    from benchmarks.torch_side import stock_learner

    config = train_config(quick=True)
    rows = torch.from_numpy(step_labels(config)).long()[0]
    losses, after = [], []
    for labels in (rows[None], rows[:, None]):
        learner = stock_learner(config)
        losses.append([float(learner.step(labels, "float32").loss) for _ in range(3)])
        after.append(learner.model.lm_head.weight)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*after)


def test_a_step_that_took_no_time_is_refused_except_with_small_sizes():
    def runs(*seconds):
        return [Run(s, s, 0.0, {}) for s in seconds]

    assert step_seconds(runs(5, 9), runs(1, 1), steps=2, quick=False) == [2, 4]
    assert step_seconds(runs(1, 9), runs(5, 1), steps=2, quick=True) == [2, 4]
    with pytest.raises(Failure, match="2 more tokens took no longer"):
        step_seconds(runs(1, 9), runs(1, 1), steps=2, quick=False)


def test_ratios_are_computed_within_a_round():
    def runs(*seconds):
        return [Run(s, s, 0.0, {}) for s in seconds]

    assert ratio(runs(2, 30, 4), runs(1, 10, 1)).median == 3  # the machine was ten times slower in the second round


def test_reached_is_a_fraction_of_the_target_in_either_direction():
    assert at_least(2.0).reached(1.0) == at_most(1.0).reached(2.0) == 0.5
