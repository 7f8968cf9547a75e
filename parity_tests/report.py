"""Report the results of the ladder: a table, a picture and JSON."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxllm.files import StrPath
from jaxllm.run.reporting import new_figure
from parity_tests.compare import MUON_BFLOAT16, TOLERANCES, Row
from parity_tests.forward import PARTS
from parity_tests.ladder import Curve

PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "numpy")


def group_rows(rows: list[Row]) -> list[list[Row]]:
    """Group the rows by comparison, in order; a group has one row for each leaf or layer."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.rung, row.what), []).append(row)
    return list(groups.values())


def worst_row(rows: list[Row]) -> Row:
    """The first failed row, or else the one with the largest relative error."""
    failed = [row for row in rows if not row.passed]
    return failed[0] if failed else max(rows, key=lambda row: (row.relative_l2 or 0.0, row.max_error or 0.0))


def print_table(rows: list[Row], title: str) -> None:
    """Print one line for each comparison: the largest errors over its leaves, and the name of the worst leaf."""
    table = Table(title=title, title_justify="left")
    for column in ("rung", "compared", "max error", "relative L2", "1 - cosine", "tolerance", "verdict"):
        right = column in ("max error", "relative L2", "1 - cosine")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "verdict")
    last = None
    for group in group_rows(rows):
        worst = worst_row(group)
        verdict = "[green]ok[/]" if all(row.passed for row in group) else "[bold red]BREACH[/]"
        note = worst.note
        if worst.tolerance == "bitwise":
            equal = f"{sum(row.passed for row in group)} of {len(group)} tensors equal"
            note = equal if worst.passed else f"{equal}; first: {worst.leaf} ({worst.note})"
        elif worst.leaf and (len(group) > 1):
            note = f"{worst.leaf}  {note}".strip()
        numbers = (
            _largest([row.max_error for row in group]),
            _largest([row.relative_l2 for row in group]),
            _largest([None if row.cosine is None else max(0.0, 1 - row.cosine) for row in group]),
        )
        rung = worst.rung if worst.rung != last else ""
        table.add_row(rung, worst.what, *numbers, _limit(worst), f"{verdict} {note}".strip())
        last = worst.rung
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _largest(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{math.nan if any(map(math.isnan, known)) else max(known):.1e}"


def _limit(row: Row) -> str:
    known = [tolerance for group in TOLERANCES.values() for tolerance in group.named()]
    tolerances = {t.name: f"{t.relative_l2:g}" for t in [*known, MUON_BFLOAT16]}
    return tolerances.get(row.tolerance, row.tolerance)


def first_divergence(rows: list[Row]) -> str | None:
    """The first failed comparison in computation order: its layer and part, or its leaf."""
    failed = next((row for row in rows if not row.passed), None)
    if failed is None:
        return None
    where = f"{failed.what} of {failed.leaf}" if failed.leaf else failed.what
    return f"{where} (rung {failed.rung})"


def write_report(
    file: StrPath, rows: list[Row], curve: Curve, seconds: dict[str, float], about: dict[str, Any]
) -> None:
    """Write `parity.json`: every row, both loss curves, the tolerances with their reasons, and the versions."""
    tolerances = [t._asdict() for t in TOLERANCES[about["precision"]].named()]
    report = {
        **about,
        "passed": all(row.passed for row in rows),
        "first_divergence": first_divergence(rows),
        "versions": {name: version(name) for name in PACKAGES},
        "tolerances": [t | {"max_over_std": _number(t["max_over_std"])} for t in tolerances],
        "seconds": {rung: round(value, 1) for rung, value in seconds.items()},
        "rows": [{name: _number(value) for name, value in asdict(row).items()} for row in rows],
        "trajectory": asdict(curve),
    }
    Path(file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _number(value: Any) -> Any:
    """Infinities and NaN as text, because JSON has no numbers for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def draw_report(file: StrPath, rows: list[Row], curve: Curve, title: str) -> None:
    """Draw `parity.png`: the error of each part by depth, both loss curves, and their difference."""
    figure = new_figure(figsize=(12, 4.5), layout="constrained")
    depth, losses = figure.subplots(1, 2)
    figure.suptitle(title)
    for part in PARTS:
        errors = [row.relative_l2 for row in rows if row.rung == "layers" and row.what == part]
        depth.plot(range(len(errors)), _drawable(errors), "o-", markersize=3, label=part)
    limits = {row.tolerance for row in rows if row.rung == "layers" and row.what in PARTS}
    for limit in (t for group in TOLERANCES.values() for t in group.named() if t.name in limits):
        depth.axhline(limit.relative_l2, color="gray", linestyle=":", label=f"tolerance {limit.relative_l2:g}")
    depth.set(xlabel="layer", ylabel="relative L2 error", yscale="log", title="Error by depth")
    depth.xaxis.get_major_locator().set_params(integer=True)
    depth.grid(alpha=0.3)
    if limits:
        depth.legend(fontsize=8)
    steps = range(1, len(curve.jax) + 1)
    losses.plot(steps, curve.jax, label="JAX", linewidth=3, alpha=0.5)
    losses.plot(steps, curve.torch, "--", label="PyTorch" + (", its experts replayed in JAX" if curve.replayed else ""))
    losses.set(xlabel="step", ylabel="cross-entropy (nats per token)", title="Training loss in both frameworks")
    losses.grid(alpha=0.3)
    if curve.jax:
        losses.legend(loc="upper right", fontsize=8)
        apart = losses.twinx()
        apart.plot(steps, _drawable(np.abs(np.subtract(curve.jax, curve.torch))), ".", color="gray", markersize=3)
        apart.set(ylabel="difference (dots)", yscale="log")
    figure.savefig(file, dpi=100)


def _drawable(errors) -> np.ndarray:
    """Replace zeros by NaN, because a logarithmic axis cannot show them."""
    return np.where(np.asarray(errors) > 0, errors, np.nan)
