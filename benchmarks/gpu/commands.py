"""Commands of the checkout that run on the GPU as a user runs them: the ladder of parity, and the default run."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.line import Line
from benchmarks.gpu.session import Session
from benchmarks.starting import narrow_options
from benchmarks.worker import Failure
from jaxllm.files import read_json
from jaxllm.run.metrics import last_evaluation
from jaxllm.run.prepare import CONFIG_FILE


def _ladder(precision: str, session: Session) -> list[Line]:
    """JAX on the GPU, PyTorch on the CPU: all rungs on random weights of `tiny`."""
    options = ["--precision", precision, "--steps", "20"]
    if session.quick:
        options += ["--layers", "1", "--seq-len", "64", "--rungs", "weights", "layers", "logits", "loss"]
    with tempfile.TemporaryDirectory() as folder:
        session.command("-m", "parity_tests", *options, "--out", folder)
        report = read_json(Path(folder) / "parity.json")
    rungs = list(report["seconds"])
    agrees = f"{len(report['rows'])} comparisons agree, {rungs[0]} to {rungs[-1]}"
    errors = (row["relative_l2"] for row in report["rows"])
    largest = max((error for error in errors if isinstance(error, float)), default=0.0)
    return [
        Line(
            what=f"tiny, {precision}",
            measured=agrees if report["passed"] else f"BREACH, first in: {report['first_divergence']}",
            reference=f"PyTorch on the CPU; largest relative L2 {largest:.1e}",
            figures={"passed": report["passed"], "rungs": report["seconds"], "largest_relative_l2": largest},
        )
    ]


ladder_float32 = functools.partial(_ladder, "float32")
ladder_bfloat16 = functools.partial(_ladder, "bfloat16")


def default_run(session: Session) -> list[Line]:
    """`python train.py`, from its start to its end."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        options = narrow_options(Path(scratch)) if session.quick else []
        started = time.perf_counter()
        session.command("train.py", "--run-dir", str(run), *options)
        taken = time.perf_counter() - started
        last = last_evaluation(run)
        config = read_json(run / CONFIG_FILE)
    if last is None:
        raise Failure("the run was not evaluated")
    return [
        Line(
            what=f"{config['preset']}, {last['step']} steps, {config['precision']}",
            measured=f"{taken:,.1f} s, start, compilation and samples included",
            reference=f"evaluation loss {last['eval_loss']:.4f}, {last['eval_bits_per_byte']:.4f} bits per byte",
            figures={"seconds": taken, "eval_loss": last["eval_loss"], "steps": last["step"]},
        )
    ]
