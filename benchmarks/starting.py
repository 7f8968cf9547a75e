"""Rows for compile time, start-up time and the memory of the largest model."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.finding import Finding, at_most
from benchmarks.machine import available_gib, busy_seconds
from benchmarks.sizes import NARROW
from benchmarks.timing import Spread, cpu_ratio, interleave, other_load, ratio, seconds
from benchmarks.worker import ROOT, Failure, Worker

GIB = 2**30
FULL_SIZE_GIB = 19.0
"""Memory needed by the full-size step; with less, the machine swaps or kills the process."""


def compile_time(quick: bool, rounds: int) -> list[Finding]:
    with Worker("benchmarks.jax_side:compilations", quick=quick) as jax:
        shallow, deep = jax.contenders
        runs = interleave(
            {name: functools.partial(jax.go, name) for name in (shallow, deep)}, rounds, 0 if quick else 1
        )
    return [
        Finding(
            what="lower and compile the step, no cache",
            ours=f"{seconds(runs[deep]).median:.2f} s ({deep})",
            yardstick=f"{seconds(runs[shallow]).median:.2f} s ({shallow})",
            value=ratio(runs[deep], runs[shallow]),
            target=at_most(1.3),
            other_load=other_load(runs),
            details={"cpu_ratio": cpu_ratio(runs[deep], runs[shallow])},
        )
    ]


def full_size_memory(quick: bool, rounds: int) -> list[Finding]:
    """Two steps in a separate process. `rounds` is ignored: a peak does not vary."""
    if not quick and available_gib() < FULL_SIZE_GIB:
        raise Failure(f"needs {FULL_SIZE_GIB:g} GiB of memory; {available_gib():.1f} GiB are available")
    with Worker("benchmarks.jax_side:full_size", quick=quick) as jax:
        runs = [jax.go("step") for _ in range(2)]
        parameters, after_init = jax.facts["parameters"], jax.facts["peak_after_init"]
    peak = runs[-1].figures["peak"] / GIB
    return [
        Finding(
            what="peak resident memory",
            ours=f"{peak:.2f} GiB",
            yardstick=f"{16 * parameters / GIB:.2f} GiB",
            value=Spread(peak, peak, peak),
            target=at_most(18.0),
            unit="GiB",
            timed=False,
            details={
                "parameters": parameters,
                "bytes_per_parameter": peak * GIB / parameters,
                "peak_gib_after_init": after_init / GIB,
                "step_seconds": runs[-1].seconds,
            },
        )
    ]


def start_up(quick: bool, rounds: int) -> list[Finding]:
    """New runs of `train.py`, one after the other. The first may fill the compilation cache for the others."""
    with tempfile.TemporaryDirectory() as scratch:
        starts = [_first_logged_step(Path(scratch), i, quick) for i in range(2 if quick else 1 + rounds)]
    warm = Spread.of([taken for taken, _ in starts[1:]])
    return [
        Finding(
            what="to the first logged step, warm",
            ours=f"{warm.median:.1f} s",
            yardstick=f"{starts[0][0]:.1f} s (first start)",
            value=warm,
            target=at_most(20.0),
            unit="s",
            other_load=max(load for _, load in starts[1:]),
            details={"first_start_seconds": starts[0][0]},
        )
    ]


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
