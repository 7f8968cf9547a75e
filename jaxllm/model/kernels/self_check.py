"""Whether a device's kernels compute what they must: each runs once, on small inputs, beside its formula.

The inputs have what kernels get wrong: groups that are uneven, empty or no multiple of a tile, experts in the middle
of a stack, rows of padding, an odd number of tokens. The formulas are in NumPy, in float64 on the host: they share
nothing with what they check.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.errors import one_line
from jaxllm.model.dtypes import Array
from jaxllm.model.kernels import REPLACEABLE, Kernels
from jaxllm.model.kernels.interface import ExpertKernels, ExpertRows, Saved, Weights
from jaxllm.model.kernels.matmul import linear

LIMITS = {"bfloat16": 8e-3, "float32": 4e-3}
"""Largest error of a kernel: twice that of sums in float32 whose operands and results are rounded once (in float32: to
TF32, as NVIDIA's matrix units do)."""

WORST_ROW = 4
"""How many times as far off a single row may be."""

ROUTED_GROUPS, SHARED_GROUP = (0, 130, 1, 300, 0), (131,)

Pairs = Iterator[tuple[str, Array, np.ndarray]]
"""What an array is, as the kernel made it, and as it should be; the last axis is a row."""


class Check(NamedTuple):
    kernel: str
    """`routed`, `shared` and `attention` of `Kernels`, or `product`."""
    what: str
    """Which result, or what was tried."""
    error: float
    """Norm of the difference over that of the result, or of its worst row if that says more; infinite: it failed."""
    failure: str | None
    """One line; None: it agrees."""


def check_kernels(
    kernels: Kernels,
    config: ModelConfig,
    dtype: jnp.dtype,
    only: Collection[str] = REPLACEABLE,
    lora: LoraConfig | None = None,
) -> list[Check]:
    """Run the matrix product and the kernels that a model with this config has been given, forward and backward.

    Args:
        only: which of the kernels.
        lora: the model's adapters, with which they were chosen.
    """
    D, F, h, v = small_sizes(config)
    rank = lora.rank if lora and lora.adapts("experts") else 0
    cases: dict[str, Callable[[], Pairs]] = {"product": lambda: _product(D, F, dtype)}
    if config.moe_layers and "routed" in only:
        cases["routed"] = lambda: _experts(kernels.routed, D, F, dtype, ROUTED_GROUPS, rank)
    if config.moe_layers and "shared" in only and (shared := kernels.shared) is not None:
        cases["shared"] = lambda: _experts(shared, D, F, dtype, SHARED_GROUP)
    if "attention" in only:
        cases["attention"] = lambda: _attention(kernels, h, v, dtype)
    limit = LIMITS[jnp.dtype(dtype).name]
    return [check for kernel, pairs in cases.items() for check in _checked(kernel, pairs, limit)]


def small_sizes(config: ModelConfig) -> tuple[int, int, int, int]:
    """Sizes with which the kernels are those of the config: hidden, expert hidden, and heads of queries and values.

    Large ones shrink to a size that the same tiles divide: the largest power of two in it, up to 128, stays.
    """

    def small(size: int) -> int:
        return size if size <= 512 else 256 + min(128, size & -size)

    return small(config.hidden_size), small(config.moe_intermediate_size), config.qk_head_dim, config.value_head_dim


def _checked(kernel: str, pairs: Callable[[], Pairs], limit: float) -> list[Check]:
    try:
        found = [(what, _error(np.asarray(made, np.float64), wanted)) for what, made, wanted in pairs()]
    except Exception as error:  # of the compiler, the driver, a library: kinds of their own
        return [Check(kernel, "run", float("inf"), f"it raises {type(error).__name__}: {one_line(error)}")]

    def failure(what: str, error: float) -> str | None:
        if error <= limit:
            return None
        return (
            f"its {what} differs by {error:.1e} (limit {limit:.0e})" if error < np.inf else f"its {what} is not finite"
        )

    return [Check(kernel, what, error, failure(what, error)) for what, error in found]


def _error(made: np.ndarray, wanted: np.ndarray) -> float:
    if made.shape != wanted.shape or not np.isfinite(made).all():
        return float("inf")
    difference, norms = (np.linalg.norm(a, axis=-1) for a in (made - wanted, wanted))
    typical = np.sqrt(np.mean(norms**2))
    rows = difference / np.maximum(norms, typical)
    return float(max(np.sqrt(np.mean(difference**2)) / typical, rows.max() / WORST_ROW))


def _product(D: int, F: int, dtype: jnp.dtype) -> Pairs:
    """`linear` and its gradients, which multiply by the transpose of either operand; and one row, as in decoding."""
    draw = _Draw(dtype)
    (x, x_), (w, w_), (d, d_) = draw(SHARED_GROUP[0], D), draw(D, F, scale=D**-0.5), draw(SHARED_GROUP[0], F)
    y, back = jax.vjp(jax.jit(lambda x, w: linear(x, w)), x, w)
    d_x, d_w = back(d)
    yield from (("output", y, x_ @ w_), ("gradient of rows", d_x, d_ @ w_.T), ("gradient of weights", d_w, x_.T @ d_))
    yield "output of one row", jax.jit(linear)(x[:1], w), x_[:1] @ w_


def _experts(kernels: ExpertKernels, D: int, F: int, dtype: jnp.dtype, sizes: tuple[int, ...], rank: int = 0) -> Pairs:
    """Both passes over the experts of the second of two layers; with a rank they are frozen and have adapters."""
    M, E, routed, draw = sum(sizes), len(sizes), len(sizes) > 1, _Draw(dtype)
    N, shapes = M // 2 if routed else M, ((D, F), (D, F), (F, D))
    (x, x_), (d_out, d_) = draw(N, D), draw(N, D)
    stacks = [draw(2 * E, *shape, scale=shape[0] ** -0.5) for shape in shapes]
    masters, own = tuple(stack.astype(jnp.float32) for stack, _ in stacks), tuple(stack_[E:] for _, stack_ in stacks)
    factors = [(draw(E, i, rank, scale=i**-0.5), draw(E, rank, o, scale=rank**-0.5)) for i, o in shapes if rank]
    adapters: Any = tuple((a.astype(jnp.float32), b.astype(jnp.float32)) for (a, _), (b, _) in factors) or None
    if factors:
        own = tuple(weight + a_ @ b_ for weight, ((_, a_), (_, b_)) in zip(own, factors, strict=True))
    tokens = draw.random.integers(0, N, M) if routed else np.arange(M)
    w = draw.random.uniform(0.5, 1.5, (M, 1)).astype(np.float32)

    @jax.jit
    def passes(x: Array, d_out: Array, tokens: Array, w: Array, sizes: Array, offset: Array) -> tuple:
        weights: Weights = jax.tree.map(lambda master: kernels.prepared(master, x.dtype), masters)
        if routed:
            tokens, w = (jnp.pad(a, ((0, kernels.padding(M)), *[(0, 0)] * (a.ndim - 1))) for a in (tokens, w))
        rows = ExpertRows(x, tokens if routed else None, w, sizes, weights, offset, adapters)
        room = None if kernels.recomputes else Saved(kernels.new_saved(2, M, 2 * F, x.dtype), offset // E)
        out, written = kernels.ffn(rows, room)
        saved = None if room is None or written is None else Saved(written, room.layer)
        totals: Any = jax.tree.map(kernels.new_gradient, adapters or masters)
        d_rows, d_w, totals = kernels.ffn_gradients(rows, d_out, saved, totals)
        return out[:M], d_rows[:M], d_w[:M].T, *(total if adapters else total[E:] for total in totals)

    made = passes(x, d_out, jnp.asarray(tokens, jnp.int32), w, jnp.asarray(sizes, jnp.int32), jnp.int32(E))
    wanted = _experts_formula(x_[tokens], d_[tokens], w, sizes, own)
    yield from zip(("output", "gradient of rows", "gradient of row weights"), made[:3], wanted[:3], strict=True)
    for name, total, d_weight, factor in zip(
        ("gate", "up", "down"), made[3:], wanted[3:], factors or (None,) * 3, strict=True
    ):
        if factor is None:
            yield f"gradient of {name}", total, d_weight
        else:
            (_, a_), (_, b_) = factor
            yield f"gradient of A of {name}", total[0], d_weight @ b_.mT
            yield f"gradient of B of {name}", total[1], a_.mT @ d_weight


def _experts_formula(
    x: np.ndarray, d_y: np.ndarray, w: np.ndarray, sizes: tuple[int, ...], weights: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, ...]:
    """SwiGLU networks and their gradients, group by group: rows (M,D), w (M,1), each weight (E,...)."""
    ends, out, d_x, d_w = np.cumsum(sizes), np.zeros_like(x), np.zeros_like(x), np.zeros(w.shape)
    d_gate, d_up, d_down = (np.zeros_like(weight) for weight in weights)
    for e, (gate, up, down) in enumerate(zip(*weights, strict=True)):
        own = slice(ends[e] - sizes[e], ends[e])
        g, u = x[own] @ gate, x[own] @ up
        sigmoid = 1 / (1 + np.exp(-g))
        h = g * sigmoid * u
        d_weighted = d_y[own] @ down.T
        d_h = d_weighted * w[own]
        d_g, d_u = d_h * u * sigmoid * (1 + g * (1 - sigmoid)), d_h * g * sigmoid
        out[own], d_x[own], d_w[own, 0] = w[own] * h @ down, d_g @ gate.T + d_u @ up.T, (d_weighted * h).sum(axis=1)
        d_gate[e], d_up[e], d_down[e] = x[own].T @ d_g, x[own].T @ d_u, (w[own] * h).T @ d_y[own]
    return out, d_x, d_w.T, d_gate, d_up, d_down


def _attention(kernels: Kernels, h: int, v: int, dtype: jnp.dtype) -> Pairs:
    """Causal attention and its gradients, at an even length that no tile divides: of one document, and of several."""
    draw, B, T, H, scale = _Draw(dtype), 2, 190, 2, h**-0.5
    arrays, (d_out, d_) = [draw(B, T, H, size) for size in (h, h, v)], draw(B, T, H, v)
    q_, k_, v_, d_ = (a.swapaxes(1, 2) for a in (*(array_ for _, array_ in arrays), d_))
    packed = np.stack([np.repeat([1, 2, 0], (70, 90, 30)), np.repeat([1, 2, 3], (1, 128, 61))])  # 0: padding
    for documents, ending in ((None, ""), (packed, ", documents apart")):
        mask = None if documents is None else jnp.asarray(documents)
        attend = jax.jit(lambda q, k, v, mask=mask: kernels.attention(q, k, v, mask, scale))
        out, back = jax.vjp(attend, *(array for array, _ in arrays))
        seen = np.tri(T, dtype=bool)
        if documents is not None:
            seen = seen & (documents[:, None, :, None] == documents[:, None, None])
        scores = np.where(seen, scale * q_ @ k_.mT, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        d_shares = d_ @ v_.mT
        d_scores = scale * shares * (d_shares - (d_shares * shares).sum(axis=-1, keepdims=True))
        wanted = (shares @ v_, d_scores @ k_, d_scores.mT @ q_, shares.mT @ d_)
        names = [f"{name}{ending}" for name in ("output", *(f"gradient of {x}" for x in ("queries", "keys", "values")))]
        yield from zip(names, (out, *back(d_out)), (a.swapaxes(1, 2) for a in wanted), strict=True)


class _Draw:
    """Normal numbers, as the device has them and in float64, with equal values."""

    def __init__(self, dtype: jnp.dtype):
        self.random, self.dtype = np.random.default_rng(0), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> tuple[Array, np.ndarray]:
        drawn = jnp.asarray(scale * self.random.standard_normal(shape), self.dtype)
        return drawn, np.asarray(drawn, np.float64)
