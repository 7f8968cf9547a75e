"""Muon: momentum, orthogonalized by a Newton-Schulz iteration, for the matrices of the layers.

The algorithm is Keller Jordan's (https://kellerjordan.github.io/posts/muon/), in the form of Moonlight
(arXiv:2502.16982, section 2.2): an update has the size of AdamW's, so that one learning rate and one decay serve both.
Each expert's matrix is orthogonalized alone, and so are the parts that files of the DeepSeek family join.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from jaxllm.config.groups import OptimConfig
from jaxllm.model.dtypes import Array, DTypeLike, Pytree, at_least_float32
from jaxllm.model.kernels.matmul import matmul
from jaxllm.model.kernels.packed import pack, unpack
from jaxllm.model.layers import ParameterFacts
from jaxllm.model.layout import MESH_AXIS, Layout
from jaxllm.train.adamw import UpdateScalars, tree_where

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: five steps bring singular values from 1e-3 to 1 into about 0.7 to 1.2."""
STEPS = 5
EPS = 1e-7
"""The least norm by which a matrix is divided."""
RMS = 0.2
"""The root mean square of AdamW's updates, which Moonlight measured: 0.2 to 0.4."""


def muon_update(
    optim: OptimConfig,
    grads: Pytree,
    momentum: Pytree,
    params: Pytree,
    facts: Pytree,
    scalars: UpdateScalars,
    dtype: jnp.dtype,
    layout: Layout,
) -> tuple[Pytree, Pytree]:
    """One update of matrices with leading axes of layers and experts; returns the parameters and the momentum.

    With `fsdp`, each matrix is whole on one device while it is orthogonalized: two all-to-alls move each device's part
    of the updates once, out and back. Copies along `data` compute the same.

    Args:
        grads, momentum, params, facts: pytrees alike; facts are `ParameterFacts`.
        dtype: of the model. A bfloat16 model's matrices are orthogonalized in bfloat16.
    """
    specs = jax.tree.map(lambda known: layout.parameter_spec(known.axes), facts)
    beta, decay = optim.muon_momentum, optim.weight_decay

    def local(grads: Pytree, momentum: Pytree, params: Pytree, rate: Array, finite: Array) -> tuple[Pytree, Pytree]:
        new = optax.tree.update_moment(grads, momentum, beta, 1)

        def updated(param: Array, grad: Array, moment: Array, known: ParameterFacts) -> Array:
            nesterov = (1 - beta) * grad + beta * moment
            direction = _orthogonalized(nesterov, known, dtype, layout)
            change = rate.astype(param.dtype) * (direction.astype(param.dtype) + decay * param)
            return jnp.where(finite, param - change, param)

        params = jax.tree.map(updated, params, grads, new, facts)
        return params, tree_where(finite, new, momentum)

    whole = jax.sharding.PartitionSpec()
    update = layout.shard_map(local, in_specs=(specs, specs, specs, whole, whole), out_specs=(specs, specs))
    return update(grads, momentum, params, scalars.rate, scalars.finite)


def _orthogonalized(part: Array, known: ParameterFacts, dtype: jnp.dtype, layout: Layout) -> Array:
    """This device's part of the updates (L,...,in,out), each matrix orthogonalized, with the RMS of AdamW's updates."""
    cut = [d for d, axis in enumerate(known.axes) if MESH_AXIS.get(axis) == "fsdp"] if layout.fsdp > 1 else []
    layers = part.shape[0]
    exchange = functools.partial(jax.lax.all_to_all, axis_name="fsdp", tiled=True)
    if cut:  # a part of each layer's matrices -> whole matrices of some of the layers
        padding = [(0, -layers % layout.fsdp), *[(0, 0)] * (part.ndim - 1)]
        part = exchange(jnp.pad(part, padding), split_axis=0, concat_axis=cut[0])
    dtype = jnp.bfloat16 if dtype == jnp.bfloat16 else part.dtype
    # one layer at a time, so that the iteration's matrices are those of one layer
    part = unpack(jax.lax.map(lambda matrices: pack(newton_schulz(matrices, dtype)), part))
    part = RMS * math.sqrt(max(part.shape[-2:])) * part
    return exchange(part, split_axis=cut[0], concat_axis=0)[:layers] if cut else part


def newton_schulz(x: Float[Array, "*batch I O"], dtype: DTypeLike) -> Float[Array, "*batch I O"]:
    """About the orthogonal matrix U V' of each matrix U S V', computed and returned in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = (x / jnp.maximum(norm, EPS)).astype(dtype)

    def times(coefficient: float, x: Array) -> Array:  # which bfloat16 would round to 3.4375, -4.78125, 2.03125
        return (coefficient * x.astype(at_least_float32(x.dtype))).astype(x.dtype)

    def iterate(_, x: Array) -> Array:
        gram = matmul(x, x, transpose_a=not wide, transpose_b=wide)  # of the shorter side
        polynomial = times(b, gram) + times(c, matmul(gram, gram))
        return times(a, x) + (matmul(polynomial, x) if wide else matmul(x, polynomial))

    return jax.lax.fori_loop(0, STEPS, iterate, x)
