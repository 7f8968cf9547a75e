"""The measures, and every tolerance with a name and a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convert.mapping import PARAMS, ROUTING_BIAS, entries, leaf
from jaxllm.checkpoint import Weights
from jaxllm.config import ModelConfig
from parity_tests.forward import Outputs


class Tolerance(NamedTuple):
    name: str
    relative_l2: float
    max_over_std: float
    """Largest absolute error, in standard deviations of the reference."""
    near_tie: float
    """Two experts whose biased scores differ by less than this may be swapped by rounding."""
    reason: str


TOLERANCES = {
    "float32": Tolerance(
        "float32", 1e-5, 1e-4, 1e-5,
        "unit roundoff 6e-8, products of up to 1,536 terms summed in another order, 24 layers",
    ),
    "float64": Tolerance(
        "float64", 1e-10, 1e-10, 1e-12,
        "unit roundoff 1e-16: what remains at 1e-10 is another formula, not another rounding",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    what: str
    max_error: float
    relative_l2: float
    tolerance: str
    passed: bool
    note: str = ""


def relative_l2(reference: np.ndarray, other: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    difference = np.linalg.norm((reference - other).ravel())
    return float(difference / max(np.linalg.norm(reference.ravel()), np.finfo(np.float64).tiny))


def max_over_std(reference: np.ndarray, other: np.ndarray) -> float:
    """Largest absolute difference over the standard deviation of the reference."""
    return float(np.abs(reference - other).max() / max(reference.std(), np.finfo(np.float64).tiny))


def compare_arrays(what: str, reference: np.ndarray, other: np.ndarray, tolerance: Tolerance) -> Row:
    """Compare two arrays of one shape; a value that is not finite never passes."""
    wide, other = reference.astype(np.float64), other.astype(np.float64)
    largest, norm = max_over_std(wide, other), relative_l2(wide, other)
    passed = bool(norm <= tolerance.relative_l2 and largest <= tolerance.max_over_std)  # false for NaN
    return Row(what, largest, norm, tolerance.name, passed)


def compare_weights(config: ModelConfig, weights: Weights, state_dict: dict[str, np.ndarray]) -> Row:
    """Compare all weights bit for bit, by name, none left over."""
    trees = {PARAMS: weights.params, ROUTING_BIAS: weights.routing_bias}
    table = list(entries(config))
    unequal = []
    for entry in table:
        ours = entry.to_torch(np.asarray(leaf(trees[entry.tree], entry.path)))
        theirs = state_dict.get(entry.torch_name)
        if theirs is None or theirs.dtype != ours.dtype or not _same_bits(ours, theirs):
            unequal.append(entry.torch_name)
    unequal += sorted(state_dict.keys() - {entry.torch_name for entry in table})
    count = f"{len(table) - len(unequal)} of {len(table)} tensors equal"
    note = f"{count}; first: {unequal[0]}" if unequal else count
    worst = 0.0 if not unequal else float("nan")
    return Row("weights", worst, worst, "bitwise", not unequal, note)


def _same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    ours, theirs = np.ascontiguousarray(ours), np.ascontiguousarray(theirs)
    return ours.shape == theirs.shape and np.array_equal(ours.view(np.uint8), theirs.view(np.uint8))


def compare_experts(ours: Outputs, theirs: Outputs, routing_bias: np.ndarray, tolerance: Tolerance) -> Row:
    """Compare which experts each token chose. Where they differ, the choice must have been a near tie.

    Args:
        routing_bias: (L,E).
    """
    same = (np.sort(ours.experts, axis=-1) == np.sort(theirs.experts, axis=-1)).all(axis=-1)  # (L,B,T)
    agreement = f"{same.sum()} of {same.size} tokens choose the same experts"
    if same.all():
        return Row("expert choice", 0.0, 0.0, tolerance.name, True, agreement)
    biased = np.sort(ours.scores + routing_bias[:, None, None, :], axis=-1)[..., ::-1]
    k = ours.experts.shape[-1]
    margin = float((biased[..., k - 1] - biased[..., k])[~same].max())
    note = f"{agreement}; the widest margin between the rivals is {margin:.1e}"
    return Row("expert choice", margin, margin, tolerance.name, margin <= tolerance.near_tie, note)


def compare_hidden(ours: Outputs, theirs: Outputs, tolerance: Tolerance) -> list[Row]:
    """Compare the embeddings and the residual stream behind each layer."""
    names = ["embeddings", *(f"layer {i}" for i in range(len(ours.hidden) - 1))]
    return [
        compare_arrays(name, mine, other, tolerance)
        for name, mine, other in zip(names, ours.hidden, theirs.hidden, strict=True)
    ]


def compare_results(ours: Outputs, theirs: Outputs, tolerance: Tolerance) -> list[Row]:
    """Compare the logits and the loss."""
    error = abs(ours.loss - theirs.loss) / max(abs(ours.loss), np.finfo(np.float64).tiny)
    return [
        compare_arrays("logits", ours.logits, theirs.logits, tolerance),
        Row("loss", error, error, tolerance.name, bool(error <= tolerance.relative_l2)),
    ]
