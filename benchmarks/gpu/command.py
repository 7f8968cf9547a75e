"""Measure one GPU, and compare it with its plan and with PyTorch; under eight minutes on an H100.

python -m benchmarks gpu                    # every part; writes benchmarks/gpu.json
python -m benchmarks gpu step ceilings      # some parts
python -m benchmarks gpu plan plan-remat    # what is planned: needs jax[cuda13], and no GPU
python -m benchmarks gpu --quick            # small sizes on the CPU: run the code of every part
python -m benchmarks.gpu.page               # docs/gpu.md from benchmarks/gpu.json
"""

from __future__ import annotations

import subprocess
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.gpu import report
from benchmarks.gpu.line import Found
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.plans import DEFAULT_TARGET, target_of
from benchmarks.gpu.session import Session
from benchmarks.machine import describe_machine
from benchmarks.worker import ROOT, Failure
from jaxllm.command_line import parse
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.plan.targets import load_target

REPORT = ROOT / "benchmarks" / "gpu.json"

REMEDY = "install jax[cuda13] on a machine with a GPU, or pass --quick to run the code of every part on the CPU"


@dataclass(frozen=True)
class GpuArgs:
    """Which parts to measure."""

    parts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of parts; none: all of them."""
    list: bool = False
    """Print the names of the parts and measure nothing."""
    quick: bool = False
    """Small sizes on the CPU: check that every part runs."""
    budget: float = 450.0
    """Seconds in all; a part that would begin later is not measured, one that runs is ended."""
    out: Path | None = None
    """The file of the report; default: benchmarks/gpu.json, with --quick runs/gpu.json."""

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise UserError(f"parts has {name!r}: choose from {', '.join(PARTS)}")
        if not self.budget > 0:
            raise UserError(f"budget is {self.budget}: it must be larger than 0")
        if self.out is not None and self.out.is_dir():
            raise UserError(f"out is {str(self.out)!r}: it is a folder, name a file in it")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    args: GpuArgs = parse(GpuArgs, argv, "python -m benchmarks gpu", __doc__)
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:16} {part.what}")
        return 0
    session = Session(args.quick, time.monotonic() + args.budget, load_target(DEFAULT_TARGET))
    chosen = [name for name in PARTS if name in (args.parts or PARTS)]
    device = None
    if args.quick or any(PARTS[name].on_gpu for name in chosen):
        device = find_device(session)
        if not args.quick:  # the code of every part needs a data sheet
            session.target, session.card = target_of(device["name"]), device["name"]
    target = session.target and session.target.name
    about = {"quick": args.quick, "device": device, "machine": describe_machine(), "target": target}
    out = args.out or (Path("runs/gpu.json") if args.quick else REPORT)
    found: dict[str, Found] = {}

    def keep(part_and_found: Iterable[tuple[str, Found]]) -> None:
        for name, of_part in part_and_found:
            found[name] = of_part
            print(f"{name}: {of_part.not_measured or 'measured'}, {of_part.seconds:.0f} s", flush=True)
            report.write(out, report.as_json(about, found))  # a run that is ended keeps what it has

    together = [name for name in chosen if not PARTS[name].timed]
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        keep(zip(together, pool.map(lambda name: measure(name, session), together), strict=True))
    keep((name, measure(name, session)) for name in chosen if PARTS[name].timed)
    report.print_table(report.as_json(about, found))
    print(f"The report is in {out}")
    return 1 if any(of_part.not_measured for of_part in found.values()) else 0


def measure(name: str, session: Session) -> Found:
    """One part, whatever happens to it."""
    started = time.monotonic()
    if session.left <= 0:
        return Found([], "not begun: the budget of seconds was used up", 0.0)
    lines, reason = [], ""
    try:
        lines = PARTS[name].measure(session)
    except (Failure, UserError) as failure:
        reason = str(failure)
    except Exception as error:  # a bug in one part must not end the others
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    return Found(lines, reason.partition("\n")[0], time.monotonic() - started)


def find_device(session: Session) -> dict[str, Any]:
    """The GPU (with `quick` the CPU) that JAX uses, and its driver's version.

    Raises:
        UserError: JAX finds no GPU.
    """
    try:
        with session.jax("gpu.jax_side:device") as jax:
            facts = jax.facts
    except Failure as failure:
        raise UserError(f"there is no GPU that JAX can use here ({failure}): {REMEDY}") from None
    if not session.quick and facts["platform"] != "gpu":
        raise UserError(f"there is no GPU that JAX can use here, only {facts['name']!r}: {REMEDY}")
    return facts | {"driver": None if session.quick else driver_version()}


def driver_version() -> str | None:
    """Of NVIDIA's driver; None: it does not say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None
