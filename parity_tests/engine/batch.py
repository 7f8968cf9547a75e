"""Batch invariance of a causal language model: a row alone, in a batch, padded, as a prefix, with a cache."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from parity_tests.engine.judge import EPSILON, FORMULA
from parity_tests.engine.rows import Row, compare_arrays

ROWS, TOKENS, PADDED, PREFIX = 3, 11, 4, 7


def batch_rows(side: Any, lifted: bool) -> list[Row]:
    """Logits that must not depend on what else is in the batch, in float64; the note has the side's own rounding."""
    small = np.zeros((1, 2), np.int64)
    vocabulary = side.call_logits("own", small).shape[-1]
    ids = np.random.default_rng(0).integers(1, vocabulary, (ROWS, TOKENS))
    cases = {precision: _cases(side, precision, ids) for precision in (("own", "lifted") if lifted else ("own",))}
    epsilon = max(EPSILON.get(dtype, EPSILON["float32"]) for dtype in side.about()["dtypes"])
    rows = []
    for name, (wanted, got) in cases["own"].items():
        units = np.abs(wanted - got).max() / (epsilon * max(np.abs(wanted).max(), 1e-30))
        note = "the same bits" if units == 0 else f"{units:.1f} units of roundoff of the largest logit"
        if not lifted:
            limit = FORMULA._replace(name="1,000 roundings", relative_l2=1e3 * epsilon)
            row = compare_arrays("batch", name, side.framework, wanted, got, limit)
        else:
            row = compare_arrays("batch", name, side.framework, *cases["lifted"][name], FORMULA)
        rows.append(Row(**{**vars(row), "note": f"in its own precision {note}"}))
    return rows


def _cases(side: Any, precision: Any, ids: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    alone = side.call_logits(precision, ids[:1])
    whole = side.call_logits(precision, ids)
    found = {
        "a row in a batch": (alone, whole[:1]),
        "a prefix": (whole[:, :PREFIX], side.call_logits(precision, ids[:, :PREFIX])),
    }
    if takes_mask(side.logits):
        padding = np.zeros((ROWS, PADDED), ids.dtype)
        for name, order in (("padded on the right", (0, 1)), ("padded on the left", (1, 0))):
            parts = ids, padding
            padded = np.concatenate([parts[i] for i in order], axis=1)
            mask = np.concatenate([np.full(parts[i].shape, i == 0) for i in order], axis=1)
            start = PADDED if order[0] else 0
            got = side.call_logits(precision, padded, mask)
            found[name] = whole, got[:, start : start + TOKENS]
    for name, logits in side.variants.items():
        found[name] = whole, side.call_logits(precision, ids, logits=logits)
    return found


def takes_mask(logits: Any) -> bool:
    """Whether a function (model, ids) takes a mask as well."""
    return len(inspect.signature(logits).parameters) > 2
