"""Rows for what surrounds the steps: compile time, memory, start-up, checkpoints."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.finding import Finding, at_most, compare
from benchmarks.machine import available_gib, busy_seconds
from benchmarks.session import Session
from benchmarks.sizes import NARROW
from benchmarks.timing import Spread, interleave, other_load, ready, seconds
from benchmarks.worker import ROOT, Failure
from jaxllm.run.throughput import GIB

FULL_SIZE_GIB = 19.0  # needed by the full-size step; with less, the machine swaps or kills the process
STEPS_BETWEEN = 100  # checkpoints, whose cost is relative to the time of these steps


def compile_time(session: Session) -> list[Finding]:
    with ready(compile=session.jax("compilations", quick=session.quick)) as contenders:
        runs = interleave(contenders, session.rounds, 0 if session.quick else 1)
    shallow, deep = runs
    return [compare("lower and compile the step, no cache", runs, deep, shallow, at_most(1.3), "{s:.2f} s ({form})")]


def full_size_memory(session: Session) -> list[Finding]:
    """Steps in a separate process, from initialization; not repeated: a peak does not vary."""
    if not session.quick and available_gib() < FULL_SIZE_GIB:
        raise Failure(f"needs {FULL_SIZE_GIB:g} GiB of memory; {available_gib():.1f} GiB are available")
    with session.jax("steps", size="all layers", quick=session.quick, precisions=["float32"]) as jax:
        run, parameters = jax.go("float32"), jax.facts["sizes"]["parameters"]
    peak, needed = run.figures["peak"], f"{16 * parameters / GIB:.2f} GiB"
    details = {"parameters": parameters, "bytes_per_parameter": peak / parameters, "step_seconds": run.seconds}
    details["peak_gib_after_init"] = jax.facts["peak_after_init"] / GIB
    ours, target = f"{peak / GIB:.2f} GiB", at_most(18.0)
    return [Finding("peak resident memory", ours, needed, peak / GIB, target, unit="GiB", details=details)]


def checkpoint_cost(session: Session) -> list[Finding]:
    """Steps with one checkpoint, the same steps without it, and the same bytes written to a file."""
    worker = session.jax("saving_steps", quick=session.quick)
    with ready(steps=worker) as contenders:
        runs = interleave(contenders, session.rounds)
    saved, plain, written = runs.values()
    number, size = worker.facts["steps"], worker.facts["bytes"]
    slowdown = [  # time of STEPS_BETWEEN steps with a checkpoint, relative to the time without
        1 + (a.seconds - b.seconds - c.seconds) / (STEPS_BETWEEN * b.seconds / number)
        for a, b, c in zip(saved, plain, written, strict=True)
    ]
    blocked = Spread.of([run.figures["blocked"] for run in saved]).median
    more = seconds(saved).median - seconds(plain).median
    what, ours = f"a checkpoint every {STEPS_BETWEEN} steps of tiny, beyond its bytes", f"{more:.2f} s"
    shown = (f"{ours}, {blocked:.2f} s of it blocking", f"{seconds(written).median:.2f} s ({size / 1e6:.0f} MB)")
    value, details = Spread.of(slowdown), {"steps_measured": number, "bytes": size, "blocked_seconds": blocked}
    return [Finding(what, *shown, value, at_most(1.02), other_load=other_load(runs), details=details)]


def start_up(session: Session) -> list[Finding]:
    """New runs of `train.py`, one after the other. The first may fill the compilation cache for the others."""
    with tempfile.TemporaryDirectory() as scratch:
        starts = [_first_logged_step(Path(scratch), i, session.quick) for i in range(1 + session.rounds)]
    (first, _), *others = starts
    warm, load = Spread.of([taken for taken, _ in others]), max(load for _, load in others)
    what, times = "to the first logged step, warm", (f"{warm.median:.1f} s", f"{first:.1f} s (first start)")
    details = {"first_start_seconds": first}
    return [Finding(what, *times, warm, at_most(20.0), unit="s", other_load=load, details=details)]


def _first_logged_step(scratch: Path, number: int, quick: bool) -> tuple[float, float]:
    """Seconds until a new run logs its first step, and the load of other programs in that time, in cores."""
    run = ["--run-dir", str(scratch / str(number)), "--log-every", "1", "--log-format", "dict"]
    command = [sys.executable, "train.py", *run]
    if quick:
        command += narrow_options(scratch)
    busy, children = busy_seconds(), sum(os.times()[2:4])
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        logged = next((line for line in process.stdout if line.startswith("{'loss'")), None)
        taken = time.perf_counter() - started
        busy = busy_seconds() - busy
        process.kill()
    if logged is None:
        raise Failure(f"{' '.join(command[1:])} ended with code {process.returncode} before it logged a step")
    own = sum(os.times()[2:4]) - children
    return taken, max(0.0, busy - own) / taken


def narrow_options(scratch: Path) -> list[str]:
    """Options of a run of train.py that takes two steps of a small model on a small text."""
    text = scratch / "text.py"
    text.write_text("".join(f"def function_{i}(x):\n    return x + {i}\n\n" for i in range(2000)))
    model = {**NARROW, "vocab_size": 300}
    options = [str(part) for name, value in model.items() for part in (f"--model.{name.replace('_', '-')}", value)]
    return [*options, "--data", str(text), "--seq-len", "32", "--steps", "2"]
