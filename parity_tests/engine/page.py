"""The result of a comparison as a page, `parity.html`, and as JSON, `card.json`."""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxllm.files import write_text_atomically
from parity_tests.engine.judge import FORMULA, TRAINING
from parity_tests.engine.pair import Verdict
from parity_tests.engine.report import group_rows, number, rows_as_json
from parity_tests.engine.rows import Row

SMALLEST = 1e-17
"""Where the bars begin, a unit of roundoff of float64."""

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}summary{cursor:pointer;padding:.2rem 0}
.ok{color:#17692d}.bad{color:#b3261e;font-weight:600}table{border-collapse:collapse;width:100%}
td,th{padding:.1rem .5rem;text-align:left;vertical-align:middle;font-size:.85rem}th{border-bottom:1px solid #999}
td.name{font-family:ui-monospace,monospace;width:36%;overflow-wrap:anywhere}td.number{white-space:nowrap;text-align:right}
.scale{position:relative;height:.75rem;background:#eee;min-width:12rem}.error{position:absolute;height:100%;background:#4a7fb5}
.bad .error{background:#b3261e}.control{position:absolute;top:0;height:100%;border-left:2px solid #e08a00}
.limit{position:absolute;top:0;height:100%;border-left:1px dashed #555}tr.first{outline:2px solid #b3261e}
pre{white-space:pre-wrap;background:#f6f6f6;padding:.6rem;font-size:.8rem}
"""


def write_verdict(verdict: Verdict, folder: Path, command: str, file: Path | None = None) -> dict[str, Path]:
    """Write both files.

    Args:
        command: that repeats the comparison.
        file: the user's description of the pair, whose hash the card holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    card = _card(verdict, command, file)
    found = {"page": folder / "parity.html", "card": folder / "card.json"}
    write_text_atomically(found["page"], page(_content(verdict, card)))
    write_text_atomically(found["card"], json.dumps(card, indent=1) + "\n")
    return found


def _card(verdict: Verdict, command: str, file: Path | None) -> dict[str, Any]:
    try:
        release = version("jaxllm")
    except PackageNotFoundError:
        release = "not installed"
    return {
        "verdict": verdict.line(),
        "agrees": verdict.agrees,
        "command": command,
        "jaxllm": release,
        "pair": None if file is None else {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "not_compared": verdict.judgement.not_compared,
        "findings": verdict.judgement.findings,
        "controls": [control._asdict() for control in verdict.controls],
        "tolerances": [{**t._asdict(), "max_over_std": number(t.max_over_std)} for t in (FORMULA, TRAINING)],
        "sides": verdict.sides,
        "mapping": {name: entry.spelled() for name, entry in verdict.mapping.entries.items()},
        "losses": verdict.losses,
        "rows": rows_as_json(verdict.rows),
    }  # fmt: skip


class Content(NamedTuple):
    """What a page shows."""

    agrees: bool
    lines: list[str]
    """The verdict, and what was not compared."""
    rows: list[Row]
    first: Row | None
    """The first difference."""
    limits: Mapping[str, float]
    """The relative errors that tolerances allow, by their names."""
    about: dict[str, Any]
    """What is needed to repeat it."""
    rounding: Mapping[tuple[str, str, str], float] = MappingProxyType({})
    """That of both sides, by rung, what and leaf of a row."""
    tables: str = ""
    """What stands after the rows, in HTML."""


def _content(verdict: Verdict, card: dict[str, Any]) -> Content:
    tables = ""
    if verdict.controls:
        tables += "<h2>planted faults</h2><p>Each alone, in the PyTorch side: would the comparison have seen it?</p>"
        tables += _table(("fault", "result", "rung", "where"), verdict.controls)
    pairs = [(name, entry.spelled()) for name, entry in verdict.mapping.entries.items()]
    tables += f"<h2>mapping</h2><details><summary>{len(pairs)} tensors</summary>"
    tables += f"{_table(('JAX', 'PyTorch'), pairs)}</details>"
    limits = {tolerance.name: tolerance.relative_l2 for tolerance in (FORMULA, TRAINING)}
    about = {key: card[key] for key in ("command", "jaxllm", "pair", "sides")}
    judged = verdict.judgement
    return Content(
        verdict.agrees, verdict.lines(), verdict.rows, judged.first, limits, about, judged.controls, tables
    )  # fmt: skip


def page(content: Content) -> str:
    """One file that needs no network: the verdict, then for each rung a bar for each comparison."""
    body = [
        f'<h1 class="{"ok" if content.agrees else "bad"}">{html.escape(content.lines[0])}</h1>',
        *(f"<p>{html.escape(line)}</p>" for line in content.lines[1:]),
        "<p>A bar is the logarithm of the relative error, from 1e-17 to 1: red beyond the tolerance, else blue. The "
        "orange mark, where there is one, is the rounding of both sides in their own precision, the dashed line the "
        "tolerance.</p>",
    ]
    rung = ""
    for group in group_rows(content.rows):
        if group[0].rung != rung:
            rung = group[0].rung
            body.append(f"<h2>{html.escape(rung)}</h2>")
        body.append(_group(group, content))
    body.append(content.tables)
    body.append(f"<h2>to repeat it</h2><pre>{html.escape(json.dumps(content.about, indent=1, default=str))}</pre>")
    title = "Agrees" if content.agrees else "Differs"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _group(rows: list[Row], content: Content) -> str:
    failed = sum(not row.passed for row in rows)
    state = (
        f'<span class="bad">{failed} of {len(rows)} differ</span>'
        if failed
        else f'<span class="ok">{len(rows)} agree</span>'
    )
    lines = [_row(row, content) for row in rows]
    return (
        f"<details{' open' if failed or rows[0].rung == 'modules' else ''}>"
        f"<summary>{html.escape(rows[0].what)}: {state}</summary><table>{''.join(lines)}</table></details>"
    )


def _row(row: Row, content: Content) -> str:
    control = content.rounding.get((row.rung, row.what, row.leaf))
    limit, is_first = content.limits.get(row.tolerance), row is content.first
    error = "" if row.relative_l2 is None else f'<div class="error" style="width:{_place(row.relative_l2):.1f}%"></div>'
    marks = "".join(
        f'<div class="{kind}" style="left:{_place(value):.1f}%"></div>'
        for kind, value in (("control", control), ("limit", limit))
        if value
    )
    size = "" if row.relative_l2 is None else f"{row.relative_l2:.1e}"
    kinds = " ".join(kind for kind, applies in (("bad", not row.passed), ("first", is_first)) if applies)
    note = row.note + (" first difference" if is_first else "")
    return (
        f'<tr class="{kinds}"><td class="name">{html.escape(row.leaf or row.what)}</td>'
        f'<td><div class="scale">{error}{marks}</div></td><td class="number">{size}</td>'
        f"<td>{html.escape(note)}</td></tr>"
    )


def _place(value: float) -> float:
    """Of a number on the logarithmic scale, in percent."""
    if not math.isfinite(value):
        return 100.0
    return min(100.0, max(0.0, 100 * (1 - math.log10(max(value, SMALLEST)) / math.log10(SMALLEST))))


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{html.escape(str(value))}</td>" for value in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
