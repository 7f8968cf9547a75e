"""Report the results: JSON, a table, and for the rows of a CPU a picture."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.finding import Finding, Found
from benchmarks.rows import PARTS, ROWS
from benchmarks.timing import QUIET
from benchmarks.worker import ROOT
from jaxllm.run.reporting import new_figure

GPU_REPORT = ROOT / "benchmarks" / "gpu.json"

COLUMNS = ("row", "what", "ours", "yardstick", "ratio (quartiles)", "target", "verdict", "other load", "CPU ratio")

GPU_COLUMNS = ("part", "what", "result", "compared with", "ratio", "goal")

STYLES = {"not measured": "bold red", "reached": "green", " of it": "yellow"}  # of cells with these words


def as_json(about: dict[str, Any], found: Mapping[str, Found]) -> dict[str, Any]:
    """The whole report; `about` has `quick`, what the numbers depend on, and of a GPU its `device`."""
    gpu, quick = "device" in about, about["quick"]
    one, several, convert = ("part", "lines", _line_as_json) if gpu else ("row", "findings", _finding_as_json)
    rows = [
        {
            one: name,
            "what": (PARTS if gpu else ROWS)[name].what,
            **({} if gpu else {"yardstick": ROWS[name].yardstick}),
            "seconds": round(of_row.seconds, 1),
            "not_measured": of_row.not_measured,
            several: [convert(finding, quick) for finding in of_row.findings],
        }
        for name, of_row in found.items()
    ]
    return {**about, f"{one}s": rows}


def _finding_as_json(f: Finding, quick: bool) -> dict[str, Any]:
    return {
        "what": f.what, "ours": f.ours, "yardstick": f.yardstick, "value": f.spread and f.spread._asdict(),
        "shown": f.shown, "target": str(f.target), "unit": f.unit, "timed": f.timed, "other_load": f.other_load,
        "details": f.details, "verdict": "not judged" if quick else f.verdict,
    }  # fmt: skip


def _line_as_json(f: Finding, quick: bool) -> dict[str, Any]:
    ratio = f"{f.spread.median:.2f}x" if f.spread else ""
    return {
        "what": f.what, "measured": f.ours, "reference": f.yardstick, "ratio": ratio, "goal": "" if quick else f.goal,
        "figures": f.details,
    }  # fmt: skip


def write(file: Path, report: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def table_rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of a GPU's table: one for each line; a part that was not measured has one, with the reason."""
    for part in report["parts"]:
        if part["not_measured"]:
            yield part["part"], part["what"], f"not measured: {part['not_measured']}", "", "", ""
        for number, line in enumerate(part["lines"]):
            name = "" if number else part["part"]
            yield name, line["what"], line["measured"], line["reference"], line["ratio"], line["goal"]


def _cpu_rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """For each row its yardstick, or why it was not measured; then its findings."""
    for row in report["rows"]:
        reason = row["not_measured"] and f"not measured: {row['not_measured']}"
        yield row["row"], row["what"], "", row["yardstick"], "", "", reason
        for f in row["findings"]:
            load = f"{f['other_load']:.2f} cores" if f["timed"] else ""
            cpu = f"{f['details']['cpu_ratio']:.2f}x" if "cpu_ratio" in f["details"] else ""
            yield "", f["what"], f["ours"], f["yardstick"], f["shown"], f["target"], f["verdict"], load, cpu


def print_table(report: dict[str, Any]) -> None:
    """A row with a name in its first column begins a section."""
    gpu, quick = "parts" in report, report["quick"]
    title = device_line(report) if gpu else "Measurements and their yardsticks"
    if quick:
        title = f"Small sizes on the CPU: checks only that every {'part' if gpu else 'row'} runs"
    table = Table(title=title, title_justify="left")
    for column in GPU_COLUMNS if gpu else COLUMNS:
        table.add_column(column, justify="right" if column == "ours" or "ratio" in column else "left")
    for row in table_rows(report) if gpu else _cpu_rows(report):
        if row[0]:
            table.add_section()
        styles = (next((style for words, style in STYLES.items() if words in cell), "") for cell in row)
        table.add_row(*map(Text, row, styles))
    Console(width=None if sys.stdout.isatty() else 170, markup=False).print(table)
    loud = [row["row"] for row in report.get("rows", ()) if any(f["other_load"] > QUIET for f in row["findings"])]
    if loud and not quick:
        print(f"Other programs kept more than {QUIET:g} cores busy: {', '.join(loud)}.")


def device_line(report: dict[str, Any]) -> str:
    """The device, the processor and the versions, in one line."""
    device, machine = report["device"], report["machine"]
    names = [device["name"]] if device else ["no GPU"]
    for key, what in (("compute_capability", "compute capability"), ("driver", "driver")):
        if device and device[key]:
            names.append(f"{what} {device[key]}")
    return f"{', '.join(names)}; {machine['cores']} cores of {machine['cpu']}; {versions_line(report)}"


def versions_line(report: dict[str, Any]) -> str:
    versions = {"Python": report["machine"]["python"], **report["machine"]["versions"]}
    return ", ".join(f"{package} {version}" for package, version in versions.items() if version)


def draw_report(file: Path, found: Mapping[str, Found], machine: dict[str, Any], quick: bool) -> None:
    """Draw `benchmarks.png`: the fraction of its target that each finding reaches, with its spread."""
    bars = [(f"{name}: {f.what}", f) for name, of_row in found.items() for f in of_row.findings]
    figure = new_figure(figsize=(10, 1.2 + 0.4 * max(1, len(bars))), layout="constrained")
    axes = figure.subplots()
    for i, (_, finding) in enumerate(bars):
        middle, *ends = (finding.target.reached(value) for value in finding.spread)
        color = "lightgray" if quick else "tab:green" if finding.verdict == "reached" else "tab:orange"
        axes.barh(i, middle, color=color, xerr=[[middle - min(ends)], [max(ends) - middle]], capsize=3)
        axes.text(max(*ends, middle), i, f"  {finding.shown}, target {finding.target}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * max([1.0, *(f.reached for _, f in bars)]))
    axes.set_xlabel("fraction of the target reached (whiskers: quartiles of the pairwise ratios)")
    sets = " ".join(machine["instruction_sets"])
    title = "Small sizes: no verdicts" if quick else "Measurements and their yardsticks"
    versions = machine["versions"]
    about = f"{machine['cpu']}, {machine['cores']} cores ({sets}); JAX {versions['jax']}, PyTorch {versions['torch']}"
    axes.set_title(f"{title}\n{about}", fontsize=9)
    figure.savefig(file, dpi=100)
