"""Write docs/gpu.md from the report of `python -m benchmarks gpu`.

python -m benchmarks.gpu.page
python -m benchmarks.gpu.page runs/gpu.json --out runs/gpu.md
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.report import GPU_COLUMNS, GPU_REPORT, device_line, table_rows, versions_line
from benchmarks.rows import PARTS
from benchmarks.worker import ROOT
from jaxllm.command_line import parse
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.files import read_json

PAGE = ROOT / "docs" / "gpu.md"

HEAD = """# On a GPU

<!-- Made by `python -m benchmarks.gpu.page` from the report of `python -m benchmarks gpu`: do not edit. -->
"""

NOTES = """\
How it is measured, and what the machine needs: [benchmarks/README.md](../benchmarks/README.md#on-a-gpu). A plan is
arithmetic on a data sheet and on the program that XLA compiles for the card (`python -m jaxllm.plan`): nothing of it is
measured. MFU counts the model's products, no recomputation; attention is counted full (T x T) or by its causal half.
"""


@dataclass(frozen=True)
class PageArgs:
    """Which report to show, and where."""

    report: Annotated[Path, tyro.conf.Positional] = GPU_REPORT
    """A file that `python -m benchmarks gpu` wrote."""
    out: Path = PAGE
    """The page."""


def page(report: dict[str, Any]) -> str:
    """The page in Markdown."""
    measured = any(not (PARTS[part["part"]].planned or part["not_measured"]) for part in report["parts"])
    if report["quick"]:
        state = "**Small sizes on the CPU: this shows that the code runs, and no speed.**"
    elif measured:
        state = f"Measured on {device_line(report)}."
    elif report["device"] is not None:
        state = f"**Nothing could be measured on {device_line(report)}.**"
    else:
        state = (
            f"**Nothing was measured on a GPU yet.** The table has plans for one {report['target']} alone, made on a "
            f"machine without it ({versions_line(report)})."
        )
    rows = [GPU_COLUMNS, ("---",) * len(GPU_COLUMNS), *table_rows(report)]
    cells = ((cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join((HEAD, state, "", NOTES, *(f"| {' | '.join(row)} |" for row in cells), ""))


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    args: PageArgs = parse(PageArgs, argv, "python -m benchmarks.gpu.page", __doc__)
    if not args.report.is_file():
        raise UserError(f"report is {str(args.report)!r}: there is no such file, run python -m benchmarks gpu first")
    args.out.write_text(page(read_json(args.report)), encoding="utf-8")
    print(f"The page is {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
