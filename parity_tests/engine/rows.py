"""Comparisons: a row for each, the error measures, and the tolerance that a row is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    name: str
    relative_l2: float
    """The largest norm of the difference, relative to the norm of the reference."""
    max_over_std: float
    """The largest absolute error, in standard deviations of the reference."""
    reason: str
    of_whole: float = 0.0
    """A leaf with a relative error of at most 1e-2 also passes if its difference is at most this fraction of the norm
    of all leaves together."""


ANY = math.inf
"""As `max_over_std`: only the norm counts. The elements of a gradient differ in scale, by how often a token occurs."""

_MAX_CANCELLED = 1e-2  # a leaf with a larger relative error never passes


@dataclass(frozen=True)
class Row:
    """One comparison: the rung, what was compared, and its leaf or layer.

    Where no number applies (equal bits, equal choices), the measures are None and `note` describes the result.
    """

    rung: str
    what: str
    leaf: str
    passed: bool
    tolerance: str
    max_error: float | None = None  # absolute
    relative_l2: float | None = None
    cosine: float | None = None
    note: str = ""


def relative_l2(reference: np.ndarray, other: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    difference = np.linalg.norm((reference - other).ravel())
    return float(difference / max(np.linalg.norm(reference.ravel()), np.finfo(np.float64).tiny))


def max_over_std(reference: np.ndarray, other: np.ndarray) -> float:
    """Largest absolute difference over the standard deviation of the reference."""
    return float(np.abs(reference - other).max() / max(reference.std(), np.finfo(np.float64).tiny))


def cosine(reference: np.ndarray, other: np.ndarray) -> float:
    """Cosine similarity; 1 for two zeros."""
    norms = np.linalg.norm(reference.ravel()) * np.linalg.norm(other.ravel())
    if norms == 0:
        return float((reference == other).all())
    return float(np.vdot(reference.ravel(), other.ravel()) / norms)


def compare_arrays(
    rung: str, what: str, leaf: str, reference: np.ndarray, other: np.ndarray, tolerance: Tolerance, whole: float = 0.0
) -> Row:
    """Compare two arrays of the same shape in float64. Values that are not finite never pass.

    Args:
        whole: the norm of all leaves together, this one included.
    """
    if reference.shape != other.shape:
        note = f"shapes {list(reference.shape)} and {list(other.shape)}"
        return Row(rung, what, leaf, False, tolerance.name, math.inf, math.inf, 0.0, note)
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    difference, size = reference - other, float(np.linalg.norm(reference))  # each once: some are large
    norm = float(np.linalg.norm(difference) / max(size, np.finfo(np.float64).tiny))
    largest = float(np.abs(difference).max())
    passed = norm <= tolerance.relative_l2  # false for NaN
    if tolerance.max_over_std != ANY:
        passed = passed and max_over_std(reference, other) <= tolerance.max_over_std
    note, excused = "", tolerance.of_whole * whole
    if tolerance.relative_l2 < norm <= _MAX_CANCELLED and norm * size <= excused < math.inf:
        passed, note = True, f"at most {tolerance.of_whole:g} of all leaves together"
    return Row(rung, what, leaf, bool(passed), tolerance.name, largest, norm, cosine(reference, other), note)


def compare_leaves(
    rung: str, what: str, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], tolerance: Tolerance
) -> list[Row]:
    """Compare two dicts of arrays, name by name; both must have the same names."""
    whole = 0.0
    if tolerance.of_whole:
        whole = math.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in reference.values()))
    rows = [
        Row(rung, what, name, False, tolerance.name, note="in one framework only")
        for name in sorted(reference.keys() ^ other.keys())
    ]
    return rows + [
        compare_arrays(rung, what, name, values, other[name], tolerance, whole)
        for name, values in reference.items()
        if name in other
    ]


def compare_numbers(rung: str, what: str, reference: float, other: float, tolerance: Tolerance) -> Row:
    """Compare two scalars by their relative error."""
    return compare_arrays(rung, what, "", np.asarray([reference]), np.asarray([other]), tolerance._replace(
        max_over_std=ANY
    ))  # fmt: skip


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return bool((np.ascontiguousarray(ours).view(np.uint8) == np.ascontiguousarray(theirs).view(np.uint8)).all())


def compare_bits(rung: str, what: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[Row]:
    """Compare two dicts of arrays bit for bit; both must have the same names."""
    names = list(ours) + sorted(theirs.keys() - ours.keys())
    rows = []
    for name in names:
        note = ""
        if name not in ours or name not in theirs:
            note = "in one framework only"
        elif not same_bits(ours[name], theirs[name]):
            note = "the bits differ"
        rows.append(Row(rung, what, name, not note, "bitwise", note=note))
    return rows
