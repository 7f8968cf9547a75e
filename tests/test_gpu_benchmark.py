"""`python -m benchmarks gpu`: every part runs on small sizes and reports; the page is made of the report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.__main__ import main, measure
from benchmarks.decoding import bytes_of_a_token
from benchmarks.finding import Finding, at_least, at_most
from benchmarks.gpu import parts
from benchmarks.gpu.page import PAGE, page
from benchmarks.gpu.page import main as make_page
from benchmarks.report import GPU_REPORT
from benchmarks.rows import PARTS, Row
from benchmarks.session import Session
from benchmarks.sizes import DecodingSizes
from benchmarks.worker import Failure, Run
from jaxllm.config import preset
from jaxllm.devices import Target, load_target, target_of
from jaxllm.errors import UserError
from jaxllm.model import flops

FEW = ("self-check", "ceilings", "step-remat", "torch-ref")  # both sides, and what they are compared with


def session(seconds: float = 60.0) -> Session:
    return Session(True, rounds=1, gpu=True, ends=time.monotonic() + seconds, target=load_target("h100"))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [FEW, (*PARTS,)], ids=["few", "all"])
def test_every_part_runs_and_the_page_shows_it(parts, tmp_path):
    """In a separate process, as a user starts it."""
    file = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", *parts, "--quick", "--out", str(file)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = json.loads(file.read_text())
    assert [part["part"] for part in report["parts"]] == list(parts)
    missing = {part["part"]: part["not_measured"] for part in report["parts"] if part["not_measured"]}
    assert not {name for name in missing if not PARTS[name].planned}, missing
    assert all("jax[cuda13]" in reason for reason in missing.values())  # what a plan needs
    assert done.returncode == bool(missing), done.stdout + done.stderr
    assert report["device"]["platform"] == "cpu"
    assert not {"hostname", "node", "path"} & set(report["machine"])

    lines = {part["part"]: part["lines"] for part in report["parts"]}
    checked = {line["what"]: line["figures"]["error"] for line in lines["self-check"]}
    assert {"product, float32", "routed, bfloat16", "attention, bfloat16"} <= {*checked}
    assert all(0 < error < 8e-3 for error in checked.values())
    speed, mfu, *_, kernels = lines["step-remat"]
    assert speed["figures"]["seconds"]["median"] > 0
    assert mfu["figures"]["full"] > mfu["figures"]["causal"] > 0
    assert kernels["figures"]["kernels"]["XLA product"]["calls"] > 0
    ours = speed["figures"]["seconds"]["median"]
    (theirs,) = lines["torch-ref"]
    assert theirs["ratio"] == f"{theirs['figures']['seconds']['median'] / ours:.2f}x" or len(parts) > len(FEW)

    assert make_page([str(file), "--out", str(tmp_path / "gpu.md")]) == 0
    shown = (tmp_path / "gpu.md").read_text()
    assert "no speed" in shown
    assert all(f"| {line['what']} | {line['measured']} |" in shown for of_part in lines.values() for line in of_part)


def test_the_page_is_made_of_the_report():
    """Fails if one of them was changed alone: run `python -m benchmarks.gpu.page`."""
    assert PAGE.read_text() == page(json.loads(GPU_REPORT.read_text()))


def raises(session: Session) -> list[Finding]:
    raise ValueError("one\ntwo")


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (raises, "ValueError: one"),
        (lambda session: [Finding("loss", "nan", details={"step": {"first": math.nan}})], "loss: step.first is nan"),
        (lambda session: [Finding("speed", "", value=math.inf)], "speed: value is inf"),
    ],
)
def test_a_part_that_fails_is_a_line_and_the_others_run(fails, reason, tmp_path, monkeypatch, capsys):
    def works(session: Session) -> list[Finding]:
        return [Finding("what", "1 s")]

    monkeypatch.setattr(command, "find_device", lambda session: {"name": "cpu", "memory_gib": None} | DEVICE)
    monkeypatch.setitem(PARTS, "ceilings", Row("", fails))
    monkeypatch.setitem(PARTS, "step", Row("", works))
    file = tmp_path / "gpu.json"
    assert main(["gpu", "ceilings", "step", "--quick", "--out", str(file)]) == 1
    failed, measured = json.loads(file.read_text())["parts"]
    assert failed["not_measured"] == reason
    assert [line["measured"] for line in measured["lines"]] == ["1 s"]
    assert f"| not measured: {reason} |" in page(json.loads(file.read_text()))


class FakeWorker:
    """A worker whose steps take a second."""

    def __init__(self, **facts: Any):
        self.contenders = ["product", "copy", "sum"]
        self.facts = {"kernels": {}, "chosen": "", "compile_seconds": 0.0, "memory": {}} | facts

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_exception) -> None: ...

    def go(self, contender: str) -> Run:
        return Run(1.0, 1.0, 0.0, {"peak": 2**30})


def test_nothing_is_compared_with_a_step_that_failed(monkeypatch):
    ours = session()
    monkeypatch.setattr(Session, "jax", lambda *_, **__: FakeWorker(first_loss=math.nan))
    assert measure(PARTS["step"], ours).not_measured == "step: first_loss is nan"
    monkeypatch.setattr(Session, "torch", lambda *_, **__: FakeWorker(first_loss=5.0, micro_batches=1))
    (theirs,) = measure(PARTS["torch-ref"], ours).findings
    assert theirs.yardstick == "ours was not measured"


DEVICE = {"platform": "cpu", "compute_capability": None, "driver": None, "runtime": ""}


def test_a_step_that_does_not_fit_is_tried_in_micro_batches_and_leaves_no_peak(monkeypatch):
    """On a stand-in for a GPU whose peak grows with the rows of a micro-batch, and that has room for two."""
    from benchmarks.torch_side import first_that_fits, torch

    peak, tried = [0], []

    def step(labels):
        rows = labels.shape[1]
        tried.append(rows)
        peak[0] = max(peak[0], rows)
        if rows > 2:
            raise torch.OutOfMemoryError("8 rows")
        return torch.tensor(5.0)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 0))
    loss, labels = first_that_fits(step, torch.nn.Linear(1, 1), torch.arange(32).reshape(1, 8, 4))
    assert (loss, labels.shape, peak, tried) == (5.0, (4, 2, 4), [2], [8, 4, 2])
    assert labels.flatten().tolist() == list(range(32))


def test_nothing_begins_after_the_budget():
    found = measure(PARTS["step"], session(seconds=-1))
    assert "budget" in found.not_measured
    assert not found.findings


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(Failure, match="took longer than the 0 s"), session(seconds=0.2).jax("device"):
        pass
    with pytest.raises(Failure, match="took longer than the 1 s"):
        session(seconds=0.5).command("-c", "import time; time.sleep(60)")


def test_a_process_that_fails_gives_its_reason():
    with pytest.raises(Failure, match=r"TypeError: .*'nothing'"), session().jax("device", nothing=1):
        pass
    with pytest.raises(Failure, match="ended with code 1: ZeroDivisionError"):
        session().command("-c", "1 / 0")


def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    assert main(["gpu", "ceilings", "--out", str(tmp_path / "gpu.json")]) == 2
    error = capsys.readouterr().err
    assert "there is no GPU" in error
    assert "--quick" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["speed"], "parts has 'speed'"), (["--budget", "0"], "budget is 0"), (["--out", "/"], "it is a folder")],
)
def test_bad_input_is_refused_in_one_line(arguments, message, capsys):
    assert main(["gpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("TPU v5 lite", "tpu-v5e"),
        ("cpu", None),
    ],
)
def test_a_card_has_its_own_data_sheet_or_none(name, target):
    assert target_of(name) == (target and load_target(target))


def not_installed(name: str, target: Target) -> None:
    raise UserError(f"for {name}")


@pytest.mark.parametrize(
    ("card", "sheet", "ratio"),
    [
        ("NVIDIA H100 80GB HBM3", "data sheet 989.4", "0.20x"),
        ("NVIDIA H200", "data sheet 989.4", "0.20x"),
        ("NVIDIA A100-SXM4-40GB", "data sheet 312", "0.64x"),
        ("NVIDIA H100 NVL", "no data sheet for NVIDIA H100 NVL", ""),
    ],
)
def test_a_card_is_compared_with_no_other_cards_data_sheet(card, sheet, ratio, tmp_path, monkeypatch):
    facts = {"side": 8192, "work": {"product": 2e14, "copy": 1e12, "sum": 2e12}, "first_loss": 5.0}
    monkeypatch.setattr(command, "find_device", lambda session: {"name": card, "memory_gib": 70.0} | DEVICE)
    monkeypatch.setattr(Session, "jax", lambda *_, **__: FakeWorker(**facts))
    monkeypatch.setattr(parts, "check_extra", not_installed)
    file = tmp_path / "gpu.json"
    assert main(["gpu", "plan", "ceilings", "step", "--out", str(file)]) == 1
    report = json.loads(file.read_text())
    plan, ceilings, step = report["parts"]
    own = target_of(card)
    assert report["target"] == (own and own.name)
    assert plan["not_measured"] == (sheet if own is None else f"for {own.name}")
    product, _, read = ceilings["lines"]
    assert (product["reference"], product["ratio"]) == (sheet, ratio)
    assert read["reference"] == (sheet if own is None else f"data sheet {own.memory_gb_per_s:,}")
    assert step["lines"][1]["reference"].startswith(sheet if own is None else "of the data sheet's")
    assert f"| {sheet} |" in page(report)


def test_decoding_reads_the_weights_that_its_tokens_use():
    config = preset("customllm-1b")
    active = sum(flops.active_parameters(config).values())
    tables = (config.vocab_size + config.max_position_embeddings) * config.hidden_size
    one = bytes_of_a_token(config, DecodingSizes(batch=1, prompt=10, new=0), weight_bytes=2, cache_bytes=100)
    assert one == 2 * (active - tables) + 10 * 100
    many = bytes_of_a_token(config, DecodingSizes(batch=64, prompt=10, new=4), weight_bytes=2, cache_bytes=100)
    assert many == 2 * (sum(flops.parameters(config).values()) - tables) + 64 * 12 * 100


def test_a_goal_is_about_the_ratio_or_another_number():
    assert Finding("", "", value=1.0, target=at_least(2.0)).goal == ">= 2: 0.50 of it"
    assert Finding("", "", value=1.0, target=at_most(2.0), judged=3.0).goal == "<= 2: 0.67 of it"
    assert Finding("", "", target=at_most(2.0)).goal == ""
