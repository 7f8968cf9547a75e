"""What rounding explains of a row that failed, and what it does not: rows of a step."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from parity_tests.compare import Row, Tolerance
from parity_tests.engine.rows import relative_l2
from torch_ref import muon

NEIGHBOURS = 8
"""How many matrices, all within a rounding to bfloat16, show what rounding does to Muon's iteration."""

MOST_OF_ITERATION = 0.3
"""Rounding explains no more of an update than this: an update of another matrix is further away."""

STORED = "at most two units in the last place of each parameter"
"""The note of an update that is too small for its parameters."""

LOST = "most of these numbers are bfloat16: float32 was lost"

OF_BFLOAT16 = 1e-6
"""A number this near to one of bfloat16, relatively, has been rounded to it. One float32 in a thousand is by chance."""


class Update(NamedTuple):
    """A parameter before a step, and after it in both frameworks."""

    before: np.ndarray
    ours: np.ndarray
    theirs: np.ndarray


def as_stored(row: Row, update: Update, tolerance: Tolerance) -> Row:
    """A row of an update that failed, and passes if the rounding of its parameters explains it.

    Flax rounds a parameter once: half a unit in the last place. PyTorch does it twice, and the factor of its decay once
    more. What remains of the difference must be within the tolerance.
    """
    before, ours, theirs = update
    if row.passed or ours.shape != theirs.shape:
        return row
    rounding = 2.0 * np.spacing(np.maximum(np.abs(before), np.abs(ours)).astype(ours.dtype))
    change, apart = (np.asarray(ours, np.float64) - side for side in (before, theirs))
    rest = np.linalg.norm(np.where(np.abs(apart) <= rounding, 0, np.abs(apart) - rounding))
    passed = rest <= tolerance.relative_l2 * np.linalg.norm(change)  # false for NaN
    return dataclasses.replace(row, passed=True, note=STORED) if passed else row


def of_iteration(row: Row, argument: np.ndarray) -> Row:
    """A row of an update of Muon that failed, judged by what rounding does to the iteration of its argument (out,in).

    Newton-Schulz enlarges small singular values, and with them each rounding to bfloat16. So the argument and its
    neighbours, since one rounding may be a lucky one, are iterated in bfloat16, and the argument in float32: both sides
    may be that far from it.
    """
    if row.passed:
        return row

    def iterated(matrix: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
        return muon.newton_schulz(matrix, dtype).float().numpy()

    matrix, draw = torch.from_numpy(argument.astype(np.float32)), torch.Generator().manual_seed(0)
    near = (matrix * (1 + 2.0**-9 * torch.randn(matrix.shape, generator=draw).sign()) for _ in range(NEIGHBOURS))
    exact = iterated(matrix, torch.float32)
    rounded = max(relative_l2(exact, iterated(one, torch.bfloat16)) for one in (matrix, *near))
    allowed = min(2 * rounded, MOST_OF_ITERATION)
    passed = row.relative_l2 is not None and row.relative_l2 <= allowed
    note = f"the iteration's own rounding explains {allowed:.2g}"
    return dataclasses.replace(row, passed=passed, tolerance=f"{allowed:.2g}, rounding", note=note)


def still_float32(row: Row, values: np.ndarray) -> Row:
    """A row of numbers that accumulate in float32 in a bfloat16 model. It fails if most of them are of bfloat16."""
    there = values[values != 0].astype(np.float32)
    rounded = torch.from_numpy(there).bfloat16().float().numpy()
    lost = np.abs(there - rounded) <= OF_BFLOAT16 * np.abs(there)
    return dataclasses.replace(row, passed=False, note=LOST) if there.size and lost.mean() > 0.5 else row
