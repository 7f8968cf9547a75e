"""Linear, embedding, norm and rotary embedding, and the facts that a parameter carries.

Weights are float32 masters (float64 in a float64 model) and are cast to the compute dtype at each product.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from jaxllm.config import ModelConfig
from jaxllm.model.dtypes import Array, Pytree, at_least_float32
from jaxllm.model.kernels.low_rank import adapted_linear
from jaxllm.model.kernels.matmul import in_dtype, linear
from jaxllm.model.kernels.packed import read
from jaxllm.model.kernels.rms_norm import rms_norm

Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class ParameterFacts:
    """Metadata of a parameter: axis names, weight decay, optimizer. A leaf of a pytree."""

    axes: tuple[str, ...]
    """A name for each axis; `jaxllm.model.layout.MESH_AXIS` maps some of them to axes of a mesh."""
    decays: bool
    """Whether weight decay applies: to matrices and embeddings, not to norms and biases, as in the Trainer."""
    is_hidden_matrix: bool = False
    """Whether Muon updates it: the linear maps of the layers, and neither router, embeddings nor head."""


class RoutingBias(nnx.Variable):
    """State that steers the choice of experts. It is not a parameter: no gradient, no weight decay."""


class Frozen(nnx.Variable):
    """A weight that is read and not trained: of a model with adapters (`jaxllm.model.adapters`)."""


def parameter(
    value: Array,
    axes: tuple[str, ...],
    *,
    decays: bool,
    is_hidden_matrix: bool = False,
    kind: type[nnx.Variable] = nnx.Param,
) -> Any:
    """A parameter with its facts as metadata."""
    return kind(value, facts=ParameterFacts(axes, decays, is_hidden_matrix))


def parameter_facts(state: nnx.State) -> Pytree:
    """The facts of each parameter of a model's state, as nested dicts."""
    facts = jax.tree.map(lambda leaf: leaf.get_metadata("facts"), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(facts)


def stack(make: Callable[[nnx.Rngs], Module], count: int, axis: str, rngs: nnx.Rngs) -> Module:
    """`count` modules as one, whose parameters have one more axis in front, called `axis`."""
    stacked = nnx.vmap(make)(rngs.split(count))
    for _, node in nnx.iter_graph(stacked):
        if isinstance(node, nnx.Variable) and (facts := node.get_metadata().get("facts")):
            node.set_metadata(facts=dataclasses.replace(facts, axes=(axis, *facts.axes)))
    return stacked


def member(stacked: Module, axis: str, i: int) -> Module:
    """Module i of those that `stack` made along an axis, within a layer. A parameter that all of them share (an
    adapter's A) has no such axis."""

    def of_one(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(variable[i]) if axis in variable.get_metadata("facts").axes else variable

    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(of_one, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Array:
    return std * jax.random.normal(rngs.params(), shape, at_least_float32(dtype))


class Adapter(nnx.Module):
    """What is trained of a frozen linear map (LoRA, arXiv:2106.09685): it adds `scale * (x @ a) @ b`."""

    def __init__(self, a: nnx.Variable, b: nnx.Variable, scale: float):
        """a: (in, r), which other adapters may have too, b: (r, out)."""
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: Array, weight: Array, out_dtype: jnp.dtype | None) -> Array:  # (..., in) -> (..., out)
        return adapted_linear(self.scale, jnp.dtype(out_dtype or x.dtype), x, weight, self.a[...], self.b[...])

    def added_to(self, weight: Array) -> Array:  # (in, out), as one matrix
        return weight + self.scale * jnp.matmul(self.a[...], self.b[...])


class Linear(nnx.Module):
    """`x @ weight (+ bias)`. The weight is (in, out); PyTorch's is (out, in), and the converter transposes."""

    adapter: Adapter | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str, ...],
        *,
        bias: bool = False,
        std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        weight = _normal(rngs, (in_features, out_features), std, dtype)
        is_hidden = not {"score", "vocab"} & {*axes}  # neither a router nor the head
        self.weight = parameter(weight, axes, decays=True, is_hidden_matrix=is_hidden)
        zeros = jnp.zeros((out_features,), at_least_float32(dtype))
        self.bias = parameter(zeros, axes[1:], decays=False) if bias else None

    def __call__(self, x: Float[Array, "*batch I"], out_dtype: jnp.dtype | None = None) -> Float[Array, "*batch O"]:
        product = linear if self.adapter is None else self.adapter
        y = product(x.astype(self.dtype), self.weight[...], out_dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """A table (rows, D), looked up by row."""

    def __init__(self, rows: int, features: int, axis: str, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        """`axis`: name of the row axis, e.g. `vocab`."""
        self.rows, self.features, self.dtype = rows, features, dtype
        self.weight = parameter(_normal(rngs, (rows, features), std, dtype), (axis, "hidden"), decays=True)

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        return in_dtype(read(self.weight[...], ids), self.dtype)


class CustomRMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019): computed in float32, returned in x's dtype."""

    def __init__(self, features: int, *, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = parameter(jnp.ones((features,), at_least_float32(dtype)), ("norm",), decays=False)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return rms_norm(self.eps, x, self.weight[...])


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle of each rotary pair from one position to the next, (r/2,) in radians.

    In double precision on the host, so that both frameworks round the same numbers. YaRN (arXiv:2309.00071, section
    3.2) leaves fast pairs as they are, divides slow ones by its factor, and has a ramp between them.
    """
    r, yarn = config.rope_head_dim, config.rope_scaling
    frequencies = config.rope_theta ** (-np.arange(0, r, 2) / r)
    if yarn.factor == 1:
        return frequencies

    def pair(turns: float) -> float:  # that turns this often in the original context
        context = yarn.original_max_position_embeddings
        return r * math.log(context / (2 * math.pi * turns)) / (2 * math.log(config.rope_theta))

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    ramp = np.clip((np.arange(r // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return frequencies * ((1 - ramp) + ramp / yarn.factor)


class RotaryEmbedding(nnx.Module):
    """Rotary position embedding (Su et al. 2021, section 3.4), rotate-half convention; it has no weights."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def __call__(self, x: Float[Array, "B T H r"], positions: Int[Array, "#B T"]) -> Float[Array, "B T H r"]:
        acc_dtype = at_least_float32(x.dtype)
        frequencies = rotary_frequencies(self.config).astype(acc_dtype)  # (r/2,)
        angles = positions[..., None, None].astype(acc_dtype) * frequencies  # (B|1,T,1,r/2)
        cos, sin = (f(angles) * self.config.rope_scaling.rotation_scale for f in (jnp.cos, jnp.sin))
        first, second = jnp.split(x.astype(acc_dtype), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
