"""The commands for any pair of models: compare two sides, record one, compare records.

python -m parity_tests pair my_pair.py
python -m parity_tests record my_pair.py --side torch --out torch.rec
python -m parity_tests record my_pair.py --side jax --weights torch.rec --out jax.rec
python -m parity_tests compare jax.rec torch.rec
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from jaxllm.command_line import parse
from jaxllm.errors import UserError, exit_on_user_error
from parity_tests.engine.batch import batch_rows
from parity_tests.engine.judge import FORMULA, TRAINING
from parity_tests.engine.logprobs import logprob_rows, read_logprobs
from parity_tests.engine.page import write_verdict
from parity_tests.engine.pair import Options, Verdict, add_rows, mapped_sides, pair, record
from parity_tests.engine.report import print_table
from parity_tests.engine.side import RecordedSide

COMMANDS = ("pair", "record", "compare")


@dataclass(frozen=True)
class PairArgs:
    """Compare the two sides that a Python file describes."""

    file: Annotated[Path, tyro.conf.Positional]
    """It defines `jax` and `torch`, each a side or a function that returns one, and perhaps `mapping`. It is run."""
    jax: Path | None = None
    """A record to take in place of the side in JAX."""
    torch: Path | None = None
    """A record to take in place of the side in PyTorch."""
    logprobs: Path | None = None
    """JSON lines of an inference engine's log-probabilities, compared with each side that has `logits`."""
    out: Path = Path("runs/parity")
    """The folder for parity.html and card.json."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


@dataclass(frozen=True)
class RecordArgs:
    """Run one side where its framework is installed, and write what it computes to a file."""

    file: Annotated[Path, tyro.conf.Positional]
    """As for `pair`."""
    side: Literal["jax", "torch"]
    """The side to run."""
    out: Path
    """The file to write."""
    weights: Path | None = None
    """A record of the other side, whose weights are taken; none: its own, moved by noise."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


@dataclass(frozen=True)
class CompareArgs:
    """Compare two records. Neither framework is needed."""

    records: Annotated[tuple[Path, Path], tyro.conf.Positional]
    """One of a side in JAX, one of a side in PyTorch."""
    out: Path = Path("runs/parity")
    """The folder for parity.html and card.json."""


@exit_on_user_error
def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # both frameworks on one device
    name, *rest = argv
    kind = {"pair": PairArgs, "record": RecordArgs, "compare": CompareArgs}[name]
    args = parse(kind, rest, f"python -m parity_tests {name}", __doc__)
    command = shlex.join(["python", "-m", "parity_tests", *argv])
    return {"pair": _pair, "record": _record, "compare": _compare}[name](args, command)


def _pair(args: PairArgs, command: str) -> int:
    described = load(args.file)
    sides = {
        name: RecordedSide(given) if given is not None else side(described, args.file, name)
        for name, given in (("jax", args.jax), ("torch", args.torch))
    }
    texts = None if args.logprobs is None else read_logprobs(args.logprobs)
    verdict = pair(sides["jax"], sides["torch"], getattr(described, "mapping", "proposed"), args.options)
    for one in sides.values():
        if getattr(one, "logits", None) is not None and verdict.is_complete:
            add_rows(verdict, batch_rows(one, verdict.judgement.lifted))
            if texts is not None:
                add_rows(verdict, logprob_rows(one, texts))
    if texts is not None and verdict.is_complete and not any(row.rung == "logprobs" for row in verdict.rows):
        raise UserError(f"logprobs is {str(args.logprobs)!r}: no side of {args.file} has logits=, which computes them")
    return _report(verdict, args.out, command, args.file)


def _record(args: RecordArgs, command: str) -> int:
    described = load(args.file)
    one = side(described, args.file, args.side)
    options, about = args.options, {}
    if args.weights is not None:
        other = RecordedSide(args.weights)
        if other.framework == args.side:
            raise UserError(f"weights is {str(args.weights)!r}, a record of {args.side} itself: give the other side's")
        sides = (one, other) if args.side == "jax" else (other, one)
        about = mapped_sides(*sides, getattr(described, "mapping", "proposed"))
        options = Options(**{**vars(options), "noise": 0.0})
    made = record(one, options)
    made.about |= about
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made.write(args.out)
    print(f"{args.out}: {len(made.weights)} tensors, runs: {', '.join(made.runs)}")
    if "not lifted" in made.about:
        print(f"not lifted to float64: {made.about['not lifted']}")
    return 0


def _compare(args: CompareArgs, command: str) -> int:
    sides = {one.framework: one for one in map(RecordedSide, args.records)}
    if len(sides) != 2:
        raise UserError(
            f"records: both are of {', '.join(sides)}: give one of a side in JAX and one of a side in PyTorch"
        )
    verdict = pair(sides["jax"], sides["torch"])
    return _report(verdict, args.out, command, None)


def _report(verdict: Verdict, out: Path, command: str, file: Path | None) -> int:
    for name, entry in verdict.mapping.entries.items() if verdict.mapping.proposed else ():
        print(f"proposed: {name} <- {entry.spelled()}")
    print_table(verdict.rows, "JAX and PyTorch", (FORMULA, TRAINING))
    for control in verdict.controls:
        where = f" on the rung {control.rung}" if control.rung else ""
        print(f"fault: {control.fault}: {control.kind}{where}{f' ({control.note})' if control.note else ''}")
    written = write_verdict(verdict, out, command, file)
    print(f"\nThe report is in {out}: {', '.join(path.name for path in written.values())}")
    for line in reversed(verdict.lines()):
        print(line)
    return 0 if verdict.agrees else 1


def load(path: Path) -> ModuleType:
    """Run the user's description of a pair.

    Raises:
        UserError: it is not there, or it cannot be run.
    """
    if not path.is_file():
        raise UserError(f"file is {str(path)!r}: it must be a Python file that defines `jax` and `torch`")
    spec = importlib.util.spec_from_file_location(f"described_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"file is {str(path)!r}: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where classes that it defines look for it
    sys.path.insert(0, str(path.parent.resolve()))  # for modules beside it, which its functions may import later
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs {error.name}, which is not installed: install it, or import it within a function `jax` or "
            "`torch`, which runs where that side runs"
        ) from None
    return module


def side(described: ModuleType, path: Path, name: str) -> Any:
    """A side of a description.

    Raises:
        UserError: it is not defined there, or its framework is not installed.
    """
    given = getattr(described, name, None)
    if given is None or isinstance(given, ModuleType):
        raise UserError(
            f"{path} defines no side {name!r}: assign one, or write a function of that name which returns it"
        )
    try:
        found = given if hasattr(given, "run") else given()
    except ModuleNotFoundError as error:
        raise UserError(f"the side {name} of {path} needs {error.name}, which is not installed here") from None
    if not hasattr(found, "framework"):
        raise UserError(f"{name} of {path} is a {type(found).__name__}: it must be a side, such as TorchSide(...)")
    return found
