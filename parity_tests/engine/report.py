"""A table of rows, and rows as JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from parity_tests.engine.rows import Row, Tolerance


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


def print_table(rows: list[Row], title: str, tolerances: Iterable[Tolerance] = ()) -> None:
    """Print one line for each comparison: the largest errors over its leaves, and the name of the worst leaf.

    Args:
        tolerances: those whose size is shown in place of their name.
    """
    limits = {tolerance.name: f"{tolerance.relative_l2:g}" for tolerance in tolerances}
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
        table.add_row(
            rung, worst.what, *numbers, limits.get(worst.tolerance, worst.tolerance), f"{verdict} {note}".strip()
        )
        last = worst.rung
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _largest(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{math.nan if any(map(math.isnan, known)) else max(known):.1e}"


def first_divergence(rows: list[Row]) -> str | None:
    """The first failed comparison in computation order: its layer and part, or its leaf."""
    failed = next((row for row in rows if not row.passed), None)
    if failed is None:
        return None
    where = f"{failed.what} of {failed.leaf}" if failed.leaf else failed.what
    return f"{where} (rung {failed.rung})"


def rows_as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [{name: number(value) for name, value in asdict(row).items()} for row in rows]


def number(value: Any) -> Any:
    """Infinities and NaN as text, because JSON has no numbers for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
