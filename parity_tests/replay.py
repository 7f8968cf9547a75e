"""Routing replay: where the frameworks choose other experts, the Flax side runs again with those that PyTorch chose.

Rounding may decide a near tie in a router, and all that follows differs. The replay must agree in everything, and each
choice that Flax would have made differently must be a near tie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.config import ModelConfig, RouterConfig
from jaxllm.store.checkpoint import Weights
from parity_tests.compare import Row


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


def narrowest(ranks: np.ndarray, k: int, router: RouterConfig) -> np.ndarray:
    """By how little the last choice of an expert, or of a group, was decided: (...,E) -> (...)."""

    def gap(values: np.ndarray, count: int) -> np.ndarray:  # (N,n) -> (N,)
        ordered = -np.sort(-values, axis=-1)
        return ordered[:, count - 1] - ordered[:, count] if count < values.shape[-1] else np.full(len(values), np.inf)

    flat = ranks.reshape(-1, ranks.shape[-1]).astype(np.float64)
    worth = group_worth(flat, router)
    is_open = np.repeat(_is_best(worth, router.topk_group), flat.shape[1] // router.n_group, axis=1)
    open_ranks = np.where(is_open, flat, -np.finfo(np.float64).max)
    return np.minimum(gap(worth, router.topk_group), gap(open_ranks, k)).reshape(ranks.shape[:-1])


def total_flips(parts: list[Flips]) -> Flips:
    counts, groups, margins = zip(*parts, strict=True)
    return Flips(sum(counts), sum(groups), max(margins))


def routing_bias_of(config: ModelConfig, weights: Weights) -> np.ndarray:
    """The routing bias of all layers that have experts, (L,E); zero where none steers the choice."""
    for bias in jax.tree.leaves(weights.routing_bias):
        return np.asarray(bias)
    return np.zeros((config.moe_layers, config.n_routed_experts))


def same_choice(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool((np.sort(ours, axis=-1) == np.sort(theirs, axis=-1)).all())


def choice_row(rung: str, leaf: str, flips: Flips, tokens: int, near_tie: float) -> Row:
    """How many choices differ, and whether each of them is a near tie; an infinite `near_tie` judges none."""
    note = f"{tokens - flips.count} of {tokens} tokens choose the same experts"
    if flips.count:
        note += f"; replayed: {flips.count} near ties, the widest margin is {flips.margin:.1e}"
    if flips.groups:
        note += f"; {flips.groups} of them between groups"
    name = f"near tie {near_tie:.1g}" if math.isfinite(near_tie) else "not judged"
    return Row(rung, "expert choice", leaf, flips.margin <= near_tie, name, max_error=flips.margin, note=note)


class Comparison(NamedTuple):
    """One comparison of a rung, in both ways."""

    free: Callable[[], list[Row]]
    """Its rows where each framework chooses experts."""
    flips: Callable[[], Flips]
    """Choices that Flax would have made differently."""
    replayed: Callable[[], list[Row]]
    """Its rows where Flax uses the experts that PyTorch chose."""

    def rows(self, rung: str, tokens: int, near_tie: float, *, free: bool) -> list[Row]:
        """The rows of the free run if they pass; else those of the replay, if all different choices are near ties.

        Args:
            tokens: how many choices there are.
            free: whether to try it without replay. In bfloat16 rounding flips a choice in nearly every batch.
        """
        found = self.free() if free else []
        if found and all(row.passed for row in found):
            return found
        total = self.flips()
        choice = choice_row(rung, "", total, tokens, near_tie)
        if not free or (total.count and choice.passed):
            return [choice, *self.replayed()]
        return [*found, choice]  # not a near tie: report the differences of the free run
