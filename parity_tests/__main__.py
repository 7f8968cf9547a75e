"""Compare the two frameworks on your weights, and say how far apart they are.

python -m parity_tests RUN                          # a training run
python -m parity_tests DIR                          # an exported folder
python -m parity_tests --preset customllm-768       # random weights
python -m parity_tests --precision float64
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from convert.to_flax import read_weights
from convert.to_torch import export_run
from jaxllm.checkpoint import Weights, is_run, load_weights, read_model_config
from jaxllm.config import ModelConfig, preset
from jaxllm.errors import UserError, exit_on_user_error
from parity_tests.compare import TOLERANCES, Row
from parity_tests.forward import random_weights, torch_model
from parity_tests.report import compare_models, random_tokens
from torch_ref import CustomLLM as TorchCustomLLM


@dataclass(frozen=True)
class ParityArgs:
    """Weights, expert choice, hidden states, logits and loss of the two frameworks, side by side."""

    weights: Annotated[Path | None, tyro.conf.Positional] = None
    """A run or an exported folder; none: random weights of a preset."""
    preset: str = "tiny"
    """Whose random weights, where no folder is given."""
    precision: Literal["float32", "float64"] = "float32"
    seq_len: int = 500
    """Random tokens to compare on."""
    seed: int = 0


def load_pair(args: ParityArgs) -> tuple[ModelConfig, Weights, TorchCustomLLM]:
    """The Flax weights, and the PyTorch model as its user gets it: from the exported folder."""
    if args.weights is None:
        config = preset(args.preset)
        weights = random_weights(config, args.seed)
        return config, weights, torch_model(config, weights)
    if is_run(args.weights):
        config, weights = load_weights(args.weights)
        with tempfile.TemporaryDirectory() as scratch:
            export_run(args.weights, Path(scratch) / "exported")
            return config, weights, TorchCustomLLM.from_pretrained(Path(scratch) / "exported").float().eval()
    config = read_model_config(args.weights)
    weights = read_weights(args.weights, config)
    return config, weights, TorchCustomLLM.from_pretrained(args.weights).float().eval()


def print_report(rows: list[Row], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "max error / std", "relative L2", "tolerance", "verdict"):
        table.add_column(column, justify="left" if column in ("", "tolerance", "verdict") else "right")
    for row in rows:
        verdict = "[green]ok[/]" if row.passed else "[bold red]BREACH[/]"
        errors = ("", "") if row.tolerance == "bitwise" else (f"{row.max_error:.2e}", f"{row.relative_l2:.2e}")
        table.add_row(row.what, *errors, row.tolerance, f"{verdict} {row.note}".strip())
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(ParityArgs, args=argv, prog="python -m parity_tests", description=__doc__)
    if args.seq_len < 2:
        raise UserError(f"seq_len is {args.seq_len}: it must be at least 2")
    config, weights, model = load_pair(args)
    tolerance = TOLERANCES[args.precision]
    ids = random_tokens(config, args.seq_len, args.seed)
    rows = compare_models(config, weights, model, ids, args.precision)
    name = args.weights or f"random weights of {args.preset}"
    print_report(rows, f"Flax and PyTorch on {name}, {ids.shape[1]} random tokens, {args.precision}")
    print(
        f"Tolerance {tolerance.name}: relative L2 at most {tolerance.relative_l2:g}, largest error at most "
        f"{tolerance.max_over_std:g} standard deviations ({tolerance.reason})."
    )
    breaches = [row.what for row in rows if not row.passed]
    print(f"BREACH: {', '.join(breaches)}" if breaches else "The two frameworks agree.")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
