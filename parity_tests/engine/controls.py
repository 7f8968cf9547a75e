"""Negative controls: plant each generic fault and say which rung saw it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from parity_tests.engine.judge import judge
from parity_tests.engine.mapping import TensorMap
from parity_tests.engine.record import Record, Run
from parity_tests.engine.rows import relative_l2
from parity_tests.engine.torch_side import TorchSide

Class = Literal["seen", "no effect", "invariance", "blind", "not applicable"]

UNCHANGED = 1e-11
"""Relative change of results, and a hundredth of that of gradients, that is rounding in float64."""


class Control(NamedTuple):
    fault: str
    kind: Class
    rung: str = ""
    note: str = ""


def controls(
    side: TorchSide, jax: Record, torch: Record, mapping: TensorMap, known: set[tuple[str, str, str]], in_training: bool
) -> list[Control]:
    """Plant every fault alone on the PyTorch side. The JAX side is not run again.

    Args:
        known: comparisons that differ without a fault, which show nothing.
        in_training: whether the steps run in training mode.
    """
    from parity_tests.engine.faults import FAULTS

    found = []
    for fault in FAULTS:
        plant = fault.site(side.model("lifted"))
        if plant is None:
            found.append(Control(fault.name, "not applicable"))
            continue
        if fault.training and "training" not in torch.runs:
            found.append(Control(fault.name, "not applicable", note="training mode is not compared"))
            continue
        if fault.optimizer and (torch.trained is None or jax.trained is None):
            found.append(Control(fault.name, "not applicable", note="no step is compared"))
            continue
        runs, trained = {"lifted": torch.runs["lifted"]}, None
        try:
            if fault.optimizer:
                trained = side.train(
                    "lifted", len(torch.trained.losses) if torch.trained else 1, in_training, optimizer_plant=plant
                )
            elif fault.training:
                runs["training"] = side.run("lifted", training=True, plant=plant)
            else:
                runs["lifted"] = side.run("lifted", plant=plant)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            found.append(Control(fault.name, "not applicable", note=f"planted, it fails: {type(error).__name__}"))
            continue
        faulty = dataclasses.replace(torch, runs=runs, trained=trained)
        found.append(_classified(fault.name, faulty, torch, jax, mapping, known))
    return found


def _classified(
    name: str, faulty: Record, clean: Record, jax: Record, mapping: TensorMap, known: set[tuple[str, str, str]]
) -> Control:
    breaches = (row for row in judge(jax, faulty, mapping).rows if not row.passed)
    breach = next((row for row in breaches if (row.rung, row.what, row.leaf) not in known), None)
    if breach is not None:
        return Control(name, "seen", breach.rung, f"{breach.what} {breach.leaf}".strip())
    results, inside = 0.0, 0.0
    for kind, run in faulty.runs.items():
        changed = _changes(run, clean.runs[kind])
        results, inside = max(results, changed[0]), max(inside, changed[1])
    if faulty.trained is not None and clean.trained is not None:
        results = max(results, _apart(faulty.trained.first, clean.trained.first))
    if results > UNCHANGED:
        return Control(name, "blind", note=f"PyTorch changes by {results:.0e}")
    if inside > UNCHANGED:
        return Control(name, "invariance", note="inner values change, results and gradients do not")
    return Control(name, "no effect")


def _changes(one: Run, other: Run) -> tuple[float, float]:
    """The largest change of results, gradients and state, and of what is inside."""
    results = max(
        _apart(one.results, other.results), _apart(one.grads, other.grads) / 100, _apart(one.state, other.state)
    )
    return results, _apart(one.outputs, other.outputs)


def _apart(one: Any, other: Any) -> float:
    largest = 0.0
    whole = max((float(np.linalg.norm(values)) for values in other.values()), default=0.0)
    for name in other:
        if name in one and np.shape(one[name]) == np.shape(other[name]):
            norm = float(np.linalg.norm(other[name]))
            if norm > 1e-12 * whole:  # not a gradient that is zero in theory
                largest = max(largest, relative_l2(np.asarray(other[name]), np.asarray(one[name])))
            elif np.linalg.norm(one[name]) > 1e-9 * whole:
                largest = 1.0
    return largest
