"""Measure the speed, compile time and memory of training and decoding, each together with its yardstick.

python -m benchmarks                          # every row, about twenty minutes on two cores
python -m benchmarks step-eager experts-dense
python -m benchmarks --list
python -m benchmarks --quick                  # small sizes: run the code of every row, without verdicts
python -m benchmarks gpu                      # one GPU, its plan and PyTorch: see its --help
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.finding import Finding
from benchmarks.gpu import command as gpu
from benchmarks.machine import describe_machine
from benchmarks.report import Findings, draw_report, print_table, write_report
from benchmarks.rows import ROWS
from benchmarks.worker import Failure
from jaxllm.command_line import parse
from jaxllm.errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class BenchmarkArgs:
    """Which rows of the table to measure, and how."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of rows; none: all of them."""
    list: bool = False
    """Print the names of the rows and measure nothing."""
    quick: bool = False
    """Small sizes and one round: check that every row runs; there are no verdicts."""
    rounds: int = 5
    """How often each contender of a row runs; short ones run three times as often."""
    out: Path = Path("runs/benchmarks")
    """The folder for benchmarks.json and benchmarks.png."""

    def __post_init__(self) -> None:
        for name in self.rows:
            if name not in ROWS:
                raise UserError(f"rows has {name!r}: choose from {', '.join(ROWS)}")
        if self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}: it must be at least 1")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out is {str(self.out)!r}: it must be a folder")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    args: BenchmarkArgs = parse(BenchmarkArgs, argv, "python -m benchmarks", __doc__)
    if args.list:
        for name, row in ROWS.items():
            print(f"{name:18} {row.what}, against: {row.yardstick}")
        return 0
    rounds = 1 if args.quick else args.rounds
    findings: Findings = {}
    for name in args.rows or ROWS:
        started = time.perf_counter()
        findings[name] = measure(name, args.quick, rounds)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    print_table(findings, args.quick)
    machine = describe_machine()
    args.out.mkdir(parents=True, exist_ok=True)
    write_report(args.out / "benchmarks.json", findings, machine, args.quick, rounds)
    draw_report(args.out / "benchmarks.png", findings, machine, args.quick)
    print(f"The report is in {args.out}: benchmarks.json, benchmarks.png")
    return 1 if any(isinstance(found, str) for found in findings.values()) else 0


def measure(name: str, quick: bool, rounds: int) -> list[Finding] | str:
    """The findings of one row, or in one line why there are none."""
    try:
        return ROWS[name].measure(quick, rounds)
    except (Failure, UserError) as failure:
        return str(failure)
    except Exception as error:  # a bug in one row must not end the others
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".partition("\n")[0]


if __name__ == "__main__":
    sys.exit(gpu.main(sys.argv[2:]) if sys.argv[1:2] == ["gpu"] else main())
