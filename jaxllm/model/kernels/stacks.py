"""Arrays of all layers, of which each layer reads or writes its own part in place.

A scan copies each layer's part of what it reads, and each layer's results into what it returns. The experts are most of
the weights, so their loops and kernels take the whole stack and a position in it instead. The scan's carry hands the
stacks on from layer to layer.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, Pytree

Weights = tuple[Array, Array, Array]
"""gate, up (S,D,F) and down (S,F,D) of S experts: E of one layer, or those of all layers."""


class Kept(NamedTuple):
    """Where a layer keeps the experts' pre-activations for its backward pass."""

    stack: Array  # (L,M,2F); of n shared experts (L*n,N,2F)
    layer: Array | int  # () int, along the first axis


class Carried(NamedTuple):
    """What the layers hand on: each returns what it was given, or has written its part of it.

    The masters are never read here. In the backward pass the carry's cotangent goes from the last layer to the first.
    For the masters it is the gradient so far, and each layer writes the part that belongs to its experts. (If the body
    of the scan read the masters directly, it would compute a gradient of the whole stack in each layer.) For `kept` it
    is not a gradient: `end_of_layers` puts the kept numbers there, so that the layers can read them.
    """

    masters: Weights | None  # None: the weights have no gradient
    kept: Array | None  # (L,M,2F); None: each layer keeps its own, as autodiff does


def end_of_layers(grouped: ModuleType, outputs: Pytree, carried: dict[str, Carried]) -> Pytree:
    """All outputs of the layers, as they are. The backward pass gives the last layer what is handed on that way.

    A gradient through outputs that do not pass here would be wrong: the layers would find nothing kept. Integers
    have no gradient and do not pass: JAX's scan refuses the cotangents (float0) that a custom gradient gets for them.
    """
    leaves, tree = jax.tree.flatten(outputs)
    differentiable = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    passed: Any = _end_of_layers(grouped, [leaves[i] for i in differentiable], carried)
    for i, leaf in zip(differentiable, passed, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _end_of_layers(grouped: ModuleType, outputs: list[Array], carried: dict[str, Carried]) -> list[Array]:
    return outputs


def _backward(grouped: ModuleType, carried: dict[str, Carried], d_outputs: list[Array]):
    def first(of: Carried) -> Carried:
        return of._replace(masters=jax.tree.map(grouped.new_gradient, of.masters))

    return d_outputs, {name: first(of) for name, of in carried.items()}


_end_of_layers.defvjp(lambda _, outputs, carried: (outputs, carried), _backward)
