"""Low-rank adapters (LoRA, arXiv:2106.09685): all weights of a model are frozen, and A and B of some matrices learn.

An adapter belongs to a matrix of the model's files, as in PEFT. Files of the DeepSeek family join matrices that are
apart here (`jaxllm.config.joined`): they have one A, and each has its part of B. The shared experts are one network
there: gate and up have one A for all of them, and down has one B.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.config.joined import joined_linears
from jaxllm.config.lora import TARGETS
from jaxllm.errors import UserError
from jaxllm.model.dtypes import Array, Pytree, at_least_float32
from jaxllm.model.layers import Adapter, Frozen, Linear, ParameterFacts, parameter

RANK, SHARED = "rank", "shared_expert"
"""Names of axes."""


class Matrix(NamedTuple):
    """The linear maps that are one matrix of a file."""

    linears: tuple[Linear, ...]
    side_by_side: str | None = None
    """`out` or `in`: along which side those of a stack of shared experts are joined; None: each is a matrix."""


def add_adapters(model: nnx.Module, config: ModelConfig, lora: LoraConfig, rngs: nnx.Rngs) -> None:
    """Freeze all weights of a model, and give the targeted matrices adapters, with which it computes the same at first.

    A is drawn as PEFT draws it, uniformly within 1 / sqrt(in), and B is zero.

    Raises:
        UserError: the model has none of the targeted matrices, or is of no family whose files are known.
    """
    for _, node in list(nnx.iter_graph(model)):
        for name, variable in list(vars(node).items()) if isinstance(node, nnx.Module) else ():
            if isinstance(variable, nnx.Param):
                setattr(node, name, Frozen(variable[...], **variable.get_metadata()))
    found = [matrix for target in lora.targets.split(",") for matrix in matrices(model, config, target)]
    if not found:
        raise UserError(
            f"lora_targets is {lora.targets!r}: this model has none of them, choose among {', '.join(TARGETS)}"
        )
    for matrix in found:
        _adapt(matrix, lora, rngs)


def matrices(model: Any, config: ModelConfig, target: str) -> Iterator[Matrix]:
    """The matrices of one kind of `TARGETS`, of the model's stacks of layers."""
    joined = joined_linears(config)
    for layers in model.stacks:
        experts = hasattr(layers.mlp, "routed_experts")
        if target == "attention":
            yield from map(Matrix, _groups(layers.self_attn, (joined.queries, joined.latent, joined.expanded)))
        elif target == "dense" and not experts:
            yield from map(Matrix, _groups(layers.mlp, ()))
        elif target == "experts" and experts:
            yield from map(Matrix, _groups(layers.mlp.routed_experts, (joined.experts,)))
        elif target == "shared" and experts:
            for name, linear in _linears(layers.mlp.shared_experts).items():
                side = "in" if name == "down_proj" else "out"
                yield Matrix((linear,), side if joined.shared_experts else None)


def _linears(module: nnx.Module) -> dict[str, Linear]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Linear)}


def _groups(module: nnx.Module, joined: Sequence[tuple[str, ...]]) -> Iterator[tuple[Linear, ...]]:
    linears = _linears(module)
    for names in filter(None, joined):
        yield tuple(linears.pop(name) for name in names)
    yield from ((linear,) for linear in linears.values())


def _adapt(matrix: Matrix, lora: LoraConfig, rngs: nnx.Rngs) -> None:
    def new(linear: Linear, last: tuple[str, str], whole: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Names and sizes of the axes of A or B; `whole`: it is one for all shared experts."""
        facts: ParameterFacts = linear.weight.get_metadata("facts")
        sizes = dict(zip(facts.axes[:-2], linear.weight.shape[:-2], strict=True))
        sizes |= dict(zip(("in", "out"), linear.weight.shape[-2:], strict=True)) | {RANK: lora.rank}
        names: dict[str, str] = dict(zip(("in", "out"), facts.axes[-2:], strict=True))
        kept = [axis for axis in facts.axes[:-2] if not (whole and axis == SHARED)]
        return tuple(names.get(axis, axis) for axis in (*kept, *last)), tuple(sizes[axis] for axis in (*kept, *last))

    first = matrix.linears[0]
    dtype = at_least_float32(first.dtype)
    axes, shape = new(first, ("in", RANK), matrix.side_by_side == "out")
    parts = first.weight.shape[-3] if matrix.side_by_side == "in" else 1
    bound = 1 / math.sqrt(parts * first.in_features)  # kaiming uniform with a = sqrt(5)
    a = parameter(jax.random.uniform(rngs.params(), shape, dtype, -bound, bound), axes, decays=True)
    for linear in matrix.linears:
        axes, shape = new(linear, (RANK, "out"), matrix.side_by_side == "in")
        b = parameter(jnp.zeros(shape, dtype), axes, decays=True)
        linear.adapter = Adapter(a, b, lora.scale)


def merged_weights(model: nnx.Module, hold: Callable[[ParameterFacts, Any], Any] | None = None) -> Pytree:
    """The weights that a model without adapters has instead: W + scale A B, as nested dicts.

    They are computed in float32 or wider, one layer at a time, and take the place of the model's own, whose arrays are
    deleted, so that both are never in memory at once. Not under `jax.jit`.

    Args:
        hold: chooses the dtype of each, from the facts of W and float32 (`inference.Hold`); None: that of W.
    """
    for linear in [node for _, node in nnx.iter_graph(model) if isinstance(node, Linear)]:
        if (adapter := linear.adapter) is not None:
            facts = linear.weight.get_metadata("facts")
            dtype = linear.weight.dtype if hold is None else hold(facts, jnp.float32)
            factors = (_aligned(factor, facts.axes) for factor in (adapter.a, adapter.b))
            weight = linear.weight[...]
            whole = _add_product(weight.astype(dtype), *factors, adapter.scale)
            if not weight.is_deleted():  # donated, if it has the dtype already
                weight.delete()
            linear.weight = Frozen(whole, **linear.weight.get_metadata())
    return nnx.to_pure_dict(nnx.state(model, Frozen))


@functools.partial(jax.jit, static_argnames="scale", donate_argnums=0)
def _add_product(weights: Array, a: Array, b: Array, scale: float) -> Array:  # weights (L,...,in,out)
    def add(layer: Array, weights: Array) -> Array:
        whole = weights[layer].astype(a.dtype) + scale * jnp.matmul(a[layer], b[layer])
        return weights.at[layer].set(whole.astype(weights.dtype))

    return jax.lax.fori_loop(0, len(weights), add, weights)


def _aligned(factor: nnx.Variable, axes: tuple[str, ...]) -> Array:
    """A or B with an axis of size 1 where it is one for all shared experts of a weight with these axes."""
    lacks = SHARED in axes and SHARED not in factor.get_metadata("facts").axes
    return jnp.expand_dims(factor[...], axes.index(SHARED)) if lacks else factor[...]
