"""The tolerances of the ladder with their names and reasons; choices of experts that differ."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from jaxllm.config import RouterConfig
from parity_tests.engine.rows import (  # noqa: F401  the ladder's comparisons are those of the engine
    ANY,
    Row,
    Tolerance,
    compare_arrays,
    compare_bits,
    compare_leaves,
    compare_numbers,
    same_bits,
)


class Tolerances(NamedTuple):
    """The tolerances of the rungs in one precision."""

    forward: Tolerance
    gradient: Tolerance
    update: Tolerance
    trajectory: Tolerance
    decoding: Tolerance
    near_tie: float
    """Rounding may swap two experts whose biased scores differ by less; scores are in 0..1."""
    token_tie: float
    """Rounding may swap two tokens whose logits differ by less, in standard deviations of the logits."""

    def named(self) -> list[Tolerance]:
        """The tolerances that have a name and a reason."""
        return [part for part in self if isinstance(part, Tolerance)]


# The gradient of a query or key weight can be a millionth of the whole gradient: a small difference of large terms, of
# which float32 keeps four digits in either framework. The largest observed difference is 1.3e-10 of the whole gradient
# (unit roundoff: 6e-8).
_CANCELLED = 1e-9

TOLERANCES = {
    "float64": Tolerances(
        Tolerance("float64 forward", 1e-10, 1e-10, "unit roundoff 1e-16: beyond it is another formula"),
        Tolerance("float64 gradient", 1e-9, ANY, "as forward, with the cancellation of the softmax's backward pass"),
        Tolerance("float64 update", 1e-9, ANY, "Adam divides by the root of small second moments"),
        Tolerance("float64 trajectory", 1e-8, ANY, "rounding, amplified by 50 steps of training"),
        Tolerance("float64 decoding", 1e-10, 1e-10, "as forward: the absorbed products differ in their order only"),
        near_tie=1e-12,
        token_tie=1e-9,
    ),
    "float32": Tolerances(
        Tolerance("float32 forward", 1e-5, 1e-4, "unit roundoff 6e-8, sums of 1,536 terms in another order, 24 layers"),
        Tolerance("float32 gradient", 3e-5, ANY, "as forward, with the cancellation of the softmax's backward pass",
                  _CANCELLED),
        Tolerance("float32 update", 1e-4, ANY, "Adam divides by the root of small second moments"),
        Tolerance("float32 trajectory", 2e-4, ANY, "rounding, amplified by 50 steps of training"),
        Tolerance("float32 decoding", 1e-5, 1e-4, "as forward: the absorbed products differ in their order only"),
        near_tie=1e-5,
        token_tie=1e-4,
    ),
    "bfloat16": Tolerances(
        Tolerance("bfloat16 forward", 3e-2, 3e-1, "unit roundoff 4e-3; Flax rounds the residual, autocast does not"),
        Tolerance("bfloat16 gradient", 6e-2, ANY, "unit roundoff 4e-3 at each product of both passes"),
        Tolerance("bfloat16 update", 1e-2, ANY, "as the gradient, a tenth of which is in the first moment"),
        Tolerance("bfloat16 trajectory", 3e-2, ANY, "rounding, amplified by 50 steps of training"),
        Tolerance("bfloat16 decoding", 1e-1, ANY, "as forward, and choices that flip at near ties are not replayed"),
        near_tie=1e-2,
        token_tie=2e-1,
    ),
}  # fmt: skip


# Gradients of the random weights of the DeepSeek family outweigh the random moments.
DEEPSEEK_BFLOAT16 = TOLERANCES["bfloat16"]._replace(
    update=Tolerance("bfloat16 update", 3e-2, ANY, "as the gradient, half of which is in the moments")
)

# Newton-Schulz brings all singular values to about 1, and with the small ones the rounding of the gradient.
MUON_BFLOAT16 = Tolerance("bfloat16 Muon update", 1.5e-1, ANY, "as the gradient, small singular values enlarged")


class Flips(NamedTuple):
    """Tokens for which the scores of one framework prefer experts that the other framework did not choose."""

    count: int
    groups: int
    """Of them, those for which it preferred another group of experts."""
    margin: float
    """The largest difference between what it preferred and what was chosen: of scores, or of the mean scores by which
    groups are compared. 0 without flips."""


def expert_flips(scores: np.ndarray, routing_bias: np.ndarray, chosen: np.ndarray, router: RouterConfig) -> Flips:
    """Compare a choice of experts with the choice that given scores prefer.

    Args:
        scores: (..., E), without the bias.
        routing_bias: (E,), or broadcastable to the scores.
        chosen: (..., k), the other framework's choice.
        router: the rule of the choice.
    """
    ranks = (scores + routing_bias).reshape(-1, scores.shape[-1]).astype(np.float64)  # (N,E)
    chosen = chosen.reshape(len(ranks), -1)
    worth = group_worth(ranks, router)  # (N,groups)
    is_open = _is_best(worth, router.topk_group)
    open_ranks = np.where(np.repeat(is_open, ranks.shape[1] // router.n_group, axis=1), ranks, -np.inf)
    is_chosen = (chosen[..., None] == np.arange(ranks.shape[1])).any(axis=1)
    differs = np.flatnonzero((_is_best(open_ranks, chosen.shape[1]) != is_chosen).any(axis=1))
    found = [_choice_margin(ranks[i], worth[i], is_chosen[i], router.topk_group) for i in differs]
    return Flips(len(found), sum(group for _, group in found), max((margin for margin, _ in found), default=0.0))


def group_worth(ranks: np.ndarray, router: RouterConfig) -> np.ndarray:
    """The mean score of the experts by which a group is compared with others: (N,E) -> (N,groups)."""
    grouped = np.sort(ranks.reshape(len(ranks), router.n_group, -1), axis=-1)
    return grouped[..., -2 if router.has_bias else -1 :].mean(axis=-1)


def _is_best(values: np.ndarray, count: int) -> np.ndarray:  # (N,n) -> (N,n), true for the largest; ties: the first
    best = np.argsort(-values, axis=-1, kind="stable")[:, :count]
    return (best[..., None] == np.arange(values.shape[1])).any(axis=1)


def _choice_margin(ranks: np.ndarray, worth: np.ndarray, is_chosen: np.ndarray, topk_group: int) -> tuple[float, bool]:
    """How far one token's choice is from the rule, and whether a group had to be chosen otherwise: (E,), (G,), (E,).

    Which groups the other framework opened is not known, only that they hold the chosen experts: of all such sets, the
    one nearest to the rule counts.
    """
    grouped, in_group = ranks.reshape(len(worth), -1), is_chosen.reshape(len(worth), -1)
    used = set(np.flatnonzero(in_group.any(axis=1)).tolist())
    others = sorted(set(range(len(worth))) - used)
    margins = []
    for added in itertools.combinations(others, topk_group - len(used)) if len(used) <= topk_group else ():
        is_open = np.isin(np.arange(len(worth)), [*used, *added])
        missed = grouped[is_open][~in_group[is_open]].max(initial=-np.inf) - ranks[is_chosen].min()
        closed = worth[~is_open].max(initial=-np.inf) - worth[is_open].min()
        margins.append((float(max(missed, closed, 0.0)), bool(closed > 0)))
    return min(margins, default=(math.inf, True))


def total_flips(parts: list[Flips]) -> Flips:
    counts, groups, margins = zip(*parts, strict=True)
    return Flips(sum(counts), sum(groups), max(margins))
