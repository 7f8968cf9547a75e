"""The pullbacks that `jax.vjp` returns, as a loop saves them: they are pytrees of the arrays that they hold."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.model.dtypes import Array, Pytree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["sources", "tree"])
@dataclasses.dataclass(frozen=True)
class SavedPullback:
    """A pullback without the arguments of its function; an array that it holds twice is stored once."""

    arrays: list[Any]  # leaves of a pytree: JAX also puts other objects there
    sources: tuple[int, ...]
    """Where each of its leaves is, in the leaves of the arguments followed by `arrays`."""
    tree: Any


def without_arguments(pullback: Pytree, arguments: Pytree, must_hold: Pytree) -> SavedPullback:
    """What to save of a pullback of a function of these arguments.

    Raises a RuntimeError if the arrays `must_hold` are not among its leaves: copies of them could not be replaced.
    """
    (leaves, tree), given, arrays = jax.tree.flatten(pullback), jax.tree.leaves(arguments), []
    where = {id(leaf): n for n, leaf in enumerate(given)}
    if {id(leaf) for leaf in jax.tree.leaves(must_hold)} - {id(leaf) for leaf in leaves}:
        raise RuntimeError("a layer's pullback does not hold the arrays that its experts write in place")
    for leaf in leaves:
        if id(leaf) not in where:
            where[id(leaf)] = len(given) + len(arrays)
            arrays.append(leaf)
    return SavedPullback(arrays, tuple(where[id(leaf)] for leaf in leaves), tree)


def with_arguments(saved: SavedPullback, arguments: Pytree) -> Callable:
    """The pullback again, with these arguments in the place of those that it had."""
    leaves = [*jax.tree.leaves(arguments), *saved.arrays]
    return jax.tree.unflatten(saved.tree, [leaves[n] for n in saved.sources])


def without_integers(d: Pytree) -> tuple[list[Array], Callable[[Sequence[Array]], Pytree]]:
    """The floats among the gradients of all layers' results, and a function that puts those of one layer's integers
    back.

    Integers have gradients of the dtype float0, which a scan cannot slice.
    """
    leaves, tree = jax.tree.flatten(d)
    are_float = [leaf.dtype != jax.dtypes.float0 for leaf in leaves]

    def with_integers(floats: Sequence[Array]) -> Pytree:
        rest = iter(floats)
        zeros = (np.zeros(leaf.shape[1:], jax.dtypes.float0) for leaf in leaves)
        return tree.unflatten(
            [next(rest) if is_float else zero for is_float, zero in zip(are_float, zeros, strict=True)]
        )

    return [leaf for leaf, is_float in zip(leaves, are_float, strict=True) if is_float], with_integers
