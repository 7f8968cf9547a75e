"""Measure the speed, compile time and memory of training and decoding, each together with its yardstick.

python -m benchmarks                          # every row, about twenty minutes on two cores
python -m benchmarks step-eager experts-dense
python -m benchmarks --list
python -m benchmarks --quick                  # small sizes: run the code of every row, without verdicts
python -m benchmarks gpu                      # one GPU, its plan and PyTorch; takes the same options
python -m benchmarks gpu plan plan-remat      # what is planned: needs jax[cuda13], and no GPU
python -m benchmarks.gpu.page                 # docs/gpu.md from benchmarks/gpu.json
"""

import math
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import report
from benchmarks.finding import Found
from benchmarks.machine import describe_machine
from benchmarks.rows import PARTS, ROWS, Row
from benchmarks.session import Session
from benchmarks.worker import Failure
from jaxllm.command_line import parse
from jaxllm.config.fields import check_fields, option
from jaxllm.devices import load_target, target_of
from jaxllm.errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class BenchmarkArgs:
    """Which rows of the table to measure, and how."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of rows, or `gpu` and names of parts; none: all of them."""
    list: bool = False
    """Print the names and measure nothing."""
    quick: bool = False
    """Small sizes and one round on the CPU: check that everything runs; there are no verdicts."""
    rounds: int | None = option(None, ge=1)
    """How often each contender of a row runs; short ones run three times as often. Default: 5, for a GPU 3."""
    budget: float | None = None
    """Of a GPU, seconds in all: then a part is ended and the rest not begun. Default: 450, with --quick no limit."""
    out: Path | None = None
    """The folder for benchmarks.json and benchmarks.png, default runs/benchmarks; for a GPU the file of the report,
    default benchmarks/gpu.json, with --quick runs/gpu.json."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.names:
            if name not in self.table:
                raise UserError(f"{'parts' if self.gpu else 'rows'} has {name!r}: choose from {', '.join(self.table)}")
        if self.budget is not None and not (self.gpu and self.budget > 0):
            remedy = "it must be larger than 0" if self.gpu else "it is for `gpu`, leave it out"
            raise UserError(f"budget is {self.budget}: {remedy}")
        if self.out is not None and self.out.exists() and self.out.is_dir() == self.gpu:
            remedy = "it is a folder, name a file in it" if self.gpu else "it must be a folder"
            raise UserError(f"out is {str(self.out)!r}: {remedy}")

    @property
    def gpu(self) -> bool:
        return self.rows[:1] == ("gpu",)

    @property
    def table(self) -> dict[str, Row]:
        return PARTS if self.gpu else ROWS

    @property
    def names(self) -> Sequence[str]:
        return (self.rows[1:] if self.gpu else self.rows) or tuple(self.table)

    @property
    def file(self) -> Path:
        if self.gpu:
            return self.out or (Path("runs/gpu.json") if self.quick else report.GPU_REPORT)
        return (self.out or Path("runs/benchmarks")) / "benchmarks.json"


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    args: BenchmarkArgs = parse(BenchmarkArgs, argv, "python -m benchmarks", __doc__)
    if args.list:
        for name, row in args.table.items():
            print(f"{name:18} {row.what}" + (f", against: {row.yardstick}" if row.yardstick else ""))
        return 0
    target = load_target("h100") if args.gpu else None  # of a plan without a GPU, and of one with small sizes
    ends = time.monotonic() + (args.budget or (450.0 if args.gpu and not args.quick else math.inf))
    session = Session(args.quick, args.rounds or (1 if args.quick else 3 if args.gpu else 5), args.gpu, ends, target)
    order = args.table if args.gpu else args.names  # on a GPU, what others compare with comes first
    chosen = {name: args.table[name] for name in order if name in args.names}
    about: dict[str, Any] = {"quick": args.quick}
    if args.gpu:
        planned = not args.quick and all(row.planned for row in chosen.values())
        about["device"] = device = None if planned else find_device(session)
        if device and not args.quick:  # the code of every part needs a data sheet
            session.target, session.card = target_of(device["name"]), device["name"]
        about |= {"machine": describe_machine(), "target": session.target and session.target.name}
    else:
        about |= {"rounds": session.rounds, "machine": describe_machine()}
    found: dict[str, Found] = {}

    def keep(rows: Iterable[tuple[str, Found]]) -> None:
        for name, of_row in rows:
            found[name] = of_row
            print(f"{name}: {of_row.not_measured or 'measured'}, {of_row.seconds:.0f} s", flush=True)
            report.write(args.file, report.as_json(about, found))  # a run that is ended keeps what it has

    together = {name: row for name, row in chosen.items() if not row.timed}
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        keep(zip(together, pool.map(lambda row: measure(row, session), together.values()), strict=True))
    keep((name, measure(row, session)) for name, row in chosen.items() if row.timed)
    report.print_table(report.as_json(about, found))
    if args.gpu:
        print(f"The report is in {args.file}")
    else:
        report.draw_report(args.file.with_suffix(".png"), found, about["machine"], args.quick)
        print(f"The report is in {args.file.parent}: benchmarks.json, benchmarks.png")
    return 1 if any(of_row.not_measured for of_row in found.values()) else 0


def measure(row: Row, session: Session) -> Found:
    """One row, whatever happens to it."""
    started = time.monotonic()
    if session.left <= 0:
        return Found([], "not begun: the budget of seconds was used up", 0.0)
    findings, reason = [], ""
    try:
        findings = row.measure(session)
    except (Failure, UserError) as failure:
        reason = str(failure)
    except Exception as error:  # a bug in one row must not end the others
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    return Found(findings, reason.partition("\n")[0], time.monotonic() - started)


def find_device(session: Session) -> dict[str, Any]:
    """The GPU, or with `quick` the CPU, that JAX uses."""
    try:
        with session.jax("device") as jax:
            return jax.facts
    except Failure as failure:
        remedy = "install jax[cuda13] on a machine with a GPU, or pass --quick to run the code of every part on the CPU"
        raise UserError(f"there is no GPU that JAX can use here ({failure}): {remedy}") from None


if __name__ == "__main__":
    sys.exit(main())
