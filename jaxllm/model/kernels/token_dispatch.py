"""The rows of the experts, sorted by expert, and the token of each row. No token is dropped.

N tokens    k chosen experts of each    M rows, N*k    E experts    D features
"""

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxllm.model.dtypes import Array


class Dispatch(NamedTuple):
    """The rows of E experts, and where each of the (N,k) slots has its row."""

    order: Int[Array, " M"] | None  # row i is slot order[i] of the flattened slots, of the token order[i] // k
    rows: Int[Array, "N k"] | None  # row of each slot, the inverse of the order; M: of an expert of another device
    # None, both: row i is token i, of each expert. Only for `Kernels.shared`.
    group_sizes: Int[Array, " E"]  # rows of each expert


def plan_dispatch(experts: Int[Array, "N k"], n_experts: int) -> Dispatch:
    """Sort the slots by expert, keeping the order of tokens within an expert.

    Experts are numbered from 0. Slots of experts that are not below `n_experts` are of other devices: their rows come
    last and have no group.
    """
    slots, M = experts.reshape(-1), experts.size
    order = jnp.argsort(slots, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(M, dtype=order.dtype), unique_indices=True)
    rows = jnp.where(slots < n_experts, inverse, M).reshape(experts.shape)
    return Dispatch(order, rows, tokens_per_expert(experts, n_experts))


def every_token(tokens: int) -> Dispatch:
    """All tokens, as they are, are the rows of each expert."""
    return Dispatch(order=None, rows=None, group_sizes=jnp.full(1, tokens, jnp.int32))


def tokens_per_expert(experts: Int[Array, "N k"], n_experts: int) -> Int[Array, " E"]:
    return (experts.reshape(-1, 1) == jnp.arange(n_experts)).sum(axis=0, dtype=jnp.int32)


def gather_slots(rows: Float[Array, "M 1"], plan: Dispatch) -> Float[Array, "N k"]:
    """Move one scalar per sorted row back to its (token, k) slot; slots of other devices get 0."""
    return rows if plan.rows is None else _gather_or_zero(rows[:, 0], plan.rows)


def combine(rows: Float[Array, "M D"], plan: Dispatch) -> Float[Array, "N D"]:
    """The sum of each token's rows.

    The k slots are added one by one, which fuses with the gathers: XLA's sum over an axis in the middle is slow on a
    CPU.
    """
    return rows if plan.rows is None else add_all(_gather_or_zero(rows, slots) for slots in plan.rows.T)


def _gather_or_zero(rows: Array, at: Array) -> Array:
    return rows.at[at].get(mode="fill", fill_value=0)


def add_all(arrays: Iterable[Array]) -> Array:
    """Sum arrays from left to right."""
    return functools.reduce(operator.add, arrays)
