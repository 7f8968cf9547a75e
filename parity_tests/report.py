"""Report the results of the ladder: a page, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.files import StrPath, write_text_atomically
from jaxllm.run.reporting import new_figure
from parity_tests.compare import MUON_BFLOAT16, TOLERANCES, Row
from parity_tests.engine.page import Content, page
from parity_tests.engine.report import first_divergence, number, rows_as_json
from parity_tests.forward import PARTS
from parity_tests.training_rungs import Curve

PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "numpy")


NAMED = [*(tolerance for group in TOLERANCES.values() for tolerance in group.named()), MUON_BFLOAT16]
"""The tolerances whose size is shown in the table."""


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
        "tolerances": [t | {"max_over_std": number(t["max_over_std"])} for t in tolerances],
        "seconds": {rung: round(value, 1) for rung, value in seconds.items()},
        "rows": rows_as_json(rows),
        "trajectory": asdict(curve),
    }
    Path(file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_page(file: StrPath, rows: list[Row], lines: list[str], about: dict[str, Any]) -> None:
    """Write `parity.html`: the verdict and a bar for every row.

    Args:
        lines: the verdict, and what was not compared.
        about: what is needed to repeat it.
    """
    limits = {tolerance.name: tolerance.relative_l2 for tolerance in NAMED}
    first = next((row for row in rows if not row.passed), None)
    about = about | {"versions": {name: version(name) for name in PACKAGES}}
    write_text_atomically(Path(file), page(Content(first is None, lines, rows, first, limits, about)))


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
