"""Next-token cross-entropy in float32, a chunk of tokens at a time: the (N, V) logits never exist at once."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxllm.model.batch import IGNORED
from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.kernels.matmul import in_dtype, matmul
from jaxllm.model.kernels.packed import pack, unpack

CHUNK_ROWS = 1024
"""Tokens of one chunk: enough to amortise reading lm_head, few enough that 49,152 logits of each take 192 MiB."""

Gradients = Literal["none", "hidden", "all"]
"""Which gradients are computed with the loss: none, that of the hidden states, or those of the head too."""

GPU_CHUNK_ROWS = 4096
"""On an NVIDIA GPU: each chunk also reads and writes the head's gradient, and memory is the limit there."""


def next_token_targets(labels: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Shift labels, once: position t is scored on label t+1, and the last position is not scored."""
    return jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORED)], axis=1)


def count_targets(labels: Int[Array, "*batch T"]) -> Int[Array, ""]:
    """How many positions are scored."""
    return (labels[..., 1:] != IGNORED).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed_cross_entropy(
    hidden: Float[Array, "N D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, " N"],
    frozen: bool = False,
) -> Float[Array, ""]:
    """Sum of the cross-entropies of `hidden @ weight + bias` over the targets that are not ignored, in nats.

    `hidden` has the compute dtype, the head's masters and the result float32 (float64 in a float64 model). A `frozen`
    head has no gradient.
    """
    return _in_chunks(hidden, weight, bias, targets, grads="none")[0]


def _forward(hidden: Array, weight: Array, bias: Array | None, targets: Array, frozen: bool):
    return _in_chunks(hidden, weight, bias, targets, grads="hidden" if frozen else "all")


def _backward(frozen: bool, grads, d_loss: Array):
    d_hidden, d_weight, d_bias = grads
    d_weight, d_bias = jax.tree.map(lambda gradient: gradient * d_loss, (d_weight, d_bias))
    return (d_hidden * d_loss).astype(d_hidden.dtype), d_weight, d_bias, None


summed_cross_entropy.defvjp(_forward, _backward)


def _in_chunks(
    hidden: Array, weight: Array, bias: Array | None, targets: Array, *, grads: Gradients
) -> tuple[Array, Any]:
    """`_scan_chunks` as the platform needs it that the program is compiled for."""
    usual = functools.partial(_scan_chunks, grads=grads, chunk_rows=CHUNK_ROWS, for_gpu=False)
    on_gpu = functools.partial(_scan_chunks, grads=grads, chunk_rows=GPU_CHUNK_ROWS, for_gpu=True)
    return jax.lax.platform_dependent(hidden, weight, bias, targets, cuda=on_gpu, default=usual)


def _scan_chunks(
    hidden: Array,
    weight: Array,
    bias: Array | None,
    targets: Array,
    *,
    grads: Gradients,
    chunk_rows: int,
    for_gpu: bool,
) -> tuple[Array, Any]:
    """The loss, and its gradients while a chunk's logits are in memory: the backward pass only scales them."""
    N, D = hidden.shape
    rows = min(N, chunk_rows)
    chunks = -(-N // rows)
    hidden_chunks = jnp.pad(hidden, ((0, chunks * rows - N), (0, 0))).reshape(chunks, rows, D)
    target_chunks = jnp.pad(targets, (0, chunks * rows - N), constant_values=IGNORED).reshape(chunks, rows)
    compute_weight = in_dtype(weight, hidden.dtype)
    chunk = functools.partial(_chunk, compute_weight, bias, grads, for_gpu)

    zero = jnp.zeros((), at_least_float32(hidden.dtype))
    if grads == "none":
        return jax.lax.scan(lambda loss, c: (loss + chunk(*c)[0], None), zero, (hidden_chunks, target_chunks))[0], None

    def body(total, c):
        loss, d_hidden, *d_head = chunk(*c)
        return jax.tree.map(jnp.add, total, (loss, *d_head)), pack(d_hidden)

    if chunks == 1:  # no accumulator besides the gradient
        loss, d_hidden, d_weight, d_bias = chunk(hidden_chunks[0], target_chunks[0])
    else:
        head = (weight, bias) if grads == "all" else (None, None)
        start = (zero, *jax.tree.map(jnp.zeros_like, head))
        (loss, d_weight, d_bias), packed = jax.lax.scan(body, start, (hidden_chunks, target_chunks))
        d_hidden = unpack(packed)
    return loss, (d_hidden.reshape(-1, D)[:N], d_weight, d_bias)


def _largest_and_sum_of_exps(logits: Array) -> tuple[Array, Array]:
    """Of each row in one pass (arXiv:1805.02867, algorithm 3): (rows,V) -> (rows,), and the sum of exp(x - largest)."""

    def join(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        largest = jnp.maximum(one[0], other[0])
        return largest, one[1] * jnp.exp(one[0] - largest) + other[1] * jnp.exp(other[0] - largest)

    dtype = logits.dtype
    nothing = jnp.asarray(jnp.finfo(dtype).min, dtype), jnp.zeros((), dtype)
    largest, total = jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, join, (1,))
    return largest, total


def _chunk(
    weight: Array, bias: Array | None, grads: Gradients, for_gpu: bool, hidden: Array, targets: Array
) -> tuple[Any, ...]:
    """One chunk: weight (D,V) in the compute dtype, hidden (rows,D), targets (rows,).

    `for_gpu`: the largest logit and the sum in one pass over (rows,V), which a CPU computes slowly; and subtract at the
    targets everywhere. A scatter saves a pass on a CPU and costs two on a GPU: what it changes must lie in memory.
    """
    acc_dtype = at_least_float32(weight.dtype)
    logits = matmul(hidden, weight, acc_dtype)  # (rows,V)
    if bias is not None:
        logits += bias
    scored = targets != IGNORED
    safe = jnp.where(scored, targets, 0)
    at_target = jnp.take_along_axis(logits, safe[:, None], axis=-1)[:, 0]
    if for_gpu:
        largest, total = _largest_and_sum_of_exps(logits)
        exps = jnp.exp(logits - largest[:, None])  # (rows,V)
    else:
        largest = logits.max(axis=-1)
        # Sums over V or over rows are products with a vector: XLA's reductions take up to forty times as long on a CPU.
        # These products must not be rounded to TF32 or bfloat16, hence the precision.
        exps = jnp.exp(logits - largest[:, None])  # (rows,V)
        total = jnp.matmul(exps, jnp.ones(exps.shape[-1], acc_dtype), precision=jax.lax.Precision.HIGHEST)  # (rows,)
    loss = jnp.where(scored, jnp.log(total) + largest - at_target, 0).sum()
    if grads == "none":
        return loss, None, None, None
    # (rows,V): p - 1 at the target and p elsewhere, times the sum. Dividing (rows, D) on either side of the products by
    # it saves a pass over (rows, V).
    if for_gpu:
        unscaled = exps - jnp.where(jnp.arange(exps.shape[-1]) == safe[:, None], total[:, None], 0)
    else:
        unscaled = exps.at[jnp.arange(safe.size), safe].add(-total, unique_indices=True, indices_are_sorted=True)
    scale = jnp.where(scored, 1 / total, 0)
    narrow = unscaled.astype(hidden.dtype)
    d_hidden = matmul(narrow, weight, transpose_b=True) * scale[:, None]
    if grads == "hidden":
        return loss, d_hidden.astype(hidden.dtype), None, None
    d_weight = matmul((hidden * scale[:, None]).astype(hidden.dtype), narrow, acc_dtype, transpose_a=True)
    d_bias = None if bias is None else jnp.matmul(scale, unscaled, precision=jax.lax.Precision.HIGHEST)
    return loss, d_hidden.astype(hidden.dtype), d_weight, d_bias
