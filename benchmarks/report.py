"""Report the results: a table, a picture and JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.finding import Finding
from benchmarks.rows import ROWS
from benchmarks.timing import QUIET
from jaxllm.run.reporting import new_figure

Findings = dict[str, list[Finding] | str]
"""The findings of each row, or the reason why there are none."""


def verdict(finding: Finding, quick: bool) -> str:
    if quick:
        return "not judged"
    if finding.passed:
        return "reached"
    return f"{finding.target.reached(finding.value.median):.2f} of it"


def print_table(findings: Findings, quick: bool) -> None:
    title = "Small sizes: checks only that every row runs" if quick else "Measurements and their yardsticks"
    table = Table(title=title, title_justify="left")
    for column in (
        "row",
        "what",
        "ours",
        "yardstick",
        "ratio (quartiles)",
        "target",
        "verdict",
        "other load",
        "CPU ratio",
    ):
        right = column in ("ours", "ratio (quartiles)", "target")
        table.add_column(column, justify="right" if right else "left")
    for name, found in findings.items():
        row = ROWS[name]
        table.add_section()
        if isinstance(found, str):
            table.add_row(name, row.what, "", row.yardstick, "", "", f"[bold red]not measured:[/] {found}")
            continue
        for i, finding in enumerate(found):
            color = "dim" if quick else "green" if finding.passed else "yellow"
            load = f"{finding.other_load:.2f} cores" if finding.timed else ""
            cpu = f"{finding.details['cpu_ratio']:.2f}x" if "cpu_ratio" in finding.details else ""
            table.add_row(
                "" if i else name,
                finding.what if i else f"{row.what}\n{finding.what}",
                finding.ours if i else f"\n{finding.ours}",
                finding.yardstick if i else f"{row.yardstick}\n{finding.yardstick}",
                _value(finding) if i else f"\n{_value(finding)}",
                str(finding.target) if i else f"\n{finding.target}",
                f"[{color}]{verdict(finding, quick)}[/]" if i else f"\n[{color}]{verdict(finding, quick)}[/]",
                load if i else f"\n{load}",
                cpu if i else f"\n{cpu}",
            )
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)
    loud = [name for name, found in findings.items() if not isinstance(found, str) for f in found if _is_loud(f)]
    if loud and not quick:
        console.print(f"Other programs kept more than {QUIET:g} cores busy: {', '.join(dict.fromkeys(loud))}.")


def _is_loud(finding: Finding) -> bool:
    return finding.timed and finding.other_load > QUIET


def _value(finding: Finding) -> str:
    median, low, high = finding.value
    unit = "x" if finding.unit == "x" else f" {finding.unit}"
    return f"{median:.2f}{unit}" + (f" ({low:.2f} - {high:.2f})" if finding.timed else "")


def write_report(file: Path, findings: Findings, machine: dict[str, Any], quick: bool, rounds: int) -> None:
    """Write `benchmarks.json`."""
    rows = [
        {
            "row": name,
            "what": ROWS[name].what,
            "yardstick": ROWS[name].yardstick,
            **(
                {"not_measured": found} if isinstance(found, str) else {"findings": [_as_json(f, quick) for f in found]}
            ),
        }
        for name, found in findings.items()
    ]
    report = {"quick": quick, "rounds": rounds, "machine": machine, "rows": rows}
    file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _as_json(finding: Finding, quick: bool) -> dict[str, Any]:
    values = asdict(finding)
    return values | {
        "value": finding.value._asdict(),
        "target": str(finding.target),
        "verdict": verdict(finding, quick),
    }


def draw_report(file: Path, findings: Findings, machine: dict[str, Any], quick: bool) -> None:
    """Draw `benchmarks.png`: the fraction of its target that each finding reaches, with its spread."""
    bars = [
        (f"{name}: {finding.what}", finding)
        for name, found in findings.items()
        if not isinstance(found, str)
        for finding in found
    ]
    figure = new_figure(figsize=(10, 1.2 + 0.4 * max(1, len(bars))), layout="constrained")
    axes = figure.subplots()
    for i, (_, finding) in enumerate(bars):
        middle, *ends = (finding.target.reached(value) for value in finding.value)
        color = "lightgray" if quick else "tab:green" if finding.passed else "tab:orange"
        axes.barh(i, middle, color=color, xerr=[[middle - min(ends)], [max(ends) - middle]], capsize=3)
        axes.text(max(*ends, middle), i, f"  {_value(finding)}, target {finding.target}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * max([1.0, *(f.target.reached(f.value.median) for _, f in bars)]))
    axes.set_xlabel("fraction of the target reached (whiskers: quartiles of the pairwise ratios)")
    sets = " ".join(machine["instruction_sets"])
    title = "Small sizes: no verdicts" if quick else "Measurements and their yardsticks"
    versions = machine["versions"]
    about = f"{machine['cpu']}, {machine['cores']} cores ({sets}); JAX {versions['jax']}, PyTorch {versions['torch']}"
    axes.set_title(f"{title}\n{about}", fontsize=9)
    figure.savefig(file, dpi=100)
