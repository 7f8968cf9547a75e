"""The report: `gpu.json`, and its table for a terminal and for the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.line import Found
from benchmarks.gpu.parts import PARTS

COLUMNS = ("part", "what", "result", "compared with", "ratio", "goal")


def as_json(about: dict[str, Any], found: Mapping[str, Found]) -> dict[str, Any]:
    """The whole report; `about` has `quick`, `device`, `machine` and `target`."""
    parts = [
        {
            "part": name,
            "what": PARTS[name].what,
            "seconds": round(of_part.seconds, 1),
            "not_measured": of_part.not_measured,
            "lines": [line.as_json(about["quick"]) for line in of_part.lines],
        }
        for name, of_part in found.items()
    ]
    return {**about, "parts": parts}


def write(file: Path, report: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def table_rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each line, with the columns of `COLUMNS`; a part that was not measured has one, with the reason."""
    for part in report["parts"]:
        if part["not_measured"]:
            yield part["part"], part["what"], f"not measured: {part['not_measured']}", "", "", ""
        for number, line in enumerate(part["lines"]):
            name = "" if number else part["part"]
            yield name, line["what"], line["measured"], line["reference"], line["ratio"], line["goal"]


def device_line(report: dict[str, Any]) -> str:
    """The device, the processor and the versions, in one line."""
    device, machine = report["device"], report["machine"]
    name = "no GPU" if device is None else device["name"]
    if device and device["compute_capability"]:
        name += f", compute capability {device['compute_capability']}"
    if device and device["driver"]:
        name += f", driver {device['driver']}"
    return f"{name}; {machine['cores']} cores of {machine['cpu']}; {versions_line(report)}"


def versions_line(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = (f"{package} {version}" for package, version in machine["versions"].items() if version)
    return ", ".join((f"Python {machine['python']}", *versions))


def print_table(report: dict[str, Any]) -> None:
    title = "Small sizes on the CPU: checks only that every part runs" if report["quick"] else device_line(report)
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column == "ratio" else "left")
    for row in table_rows(report):
        if row[0]:
            table.add_section()
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 170, markup=False).print(table)
