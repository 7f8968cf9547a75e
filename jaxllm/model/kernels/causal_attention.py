"""Causal softmax attention of whole sequences: by blocks of queries, or by cuDNN's fused kernel on an NVIDIA GPU.

For the backward pass, neither saves anything that grows with the square of the length.
"""

import functools

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Float, Shaped

from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.kernels.matmul import save_for_backward

BLOCK_QUERIES = 128
"""Queries whose attention weights are in memory at once."""

MAX_SPANS = 8
"""A sequence is cut into at most this many spans of queries, each with a separate program that stops at the span's last
key, so that up to 7/16 of the scores are never computed. Within a span the blocks are a loop: XLA would otherwise keep
the scores of all independent blocks at once."""


def masked_softmax(scores: Array, mask: Array) -> Array:
    """Softmax over the last axis in float32 (or wider), zero where the mask is."""
    upcast = scores.astype(at_least_float32(scores.dtype))
    return jax.nn.softmax(jnp.where(mask, upcast, jnp.finfo(upcast.dtype).min), axis=-1)


def blocked_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T H h"],
    v: Float[Array, "B T H v"],
    attention_mask: Shaped[Array, "B T"] | None,
    scale: float,
) -> Float[Array, "B T H v"]:
    """A token attends to itself and to earlier tokens of its document; padding is a document of its own.

    The mask has the number of each token's document, zero at padding; None: one document. `scale` multiplies the
    scores. The backward pass saves q, k and v, and recomputes each block's weights.
    """
    length = q.shape[1]
    # heads before time: the products are batched over B,H
    q, k, v = (a.swapaxes(1, 2) for a in (q * scale, k, v))
    documents = None if attention_mask is None else attention_mask.astype(jnp.int32)
    if is_symbolic_dim(length):  # in jax.export, which cannot count blocks
        return _attend(length, k, v, documents, jnp.int32(0), q).swapaxes(1, 2)
    block = min(BLOCK_QUERIES, length)
    span = block * -(-length // (block * MAX_SPANS))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -length % block), (0, 0)))  # queries after the last are discarded
    documents = None if documents is None else jnp.pad(documents, ((0, 0), (0, -length % block)))
    spans = []
    for start in range(0, length, span):
        end = min(start + span, q.shape[2])
        blocks = jnp.stack(jnp.split(q[:, :, start:end], (end - start) // block, axis=2))  # (blocks,B,H,b,h)
        starts = jnp.arange(start, end, block)
        attend = functools.partial(_attend, min(end, length), k, v, documents)
        spans += [*jax.lax.map(lambda x, attend=attend: attend(*x), (starts, blocks))]
    return save_for_backward(jnp.concatenate(spans, axis=2)[:, :, :length].swapaxes(1, 2))


@functools.partial(jax.checkpoint, static_argnums=0)
def _attend(end: int, k: Array, v: Array, documents: Array | None, start: Array, q: Array) -> Array:
    """One block of queries, from start on: (B,H,b,h) -> (B,H,b,v). It slices the keys, so no slice is saved."""
    k, v = k[:, :, :end], v[:, :, :end]
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=at_least_float32(q.dtype))
    queries, keys = start + jnp.arange(q.shape[2])[:, None], jnp.arange(end)
    mask = keys <= queries
    if documents is not None:
        own = jax.lax.dynamic_slice_in_dim(documents, start, q.shape[2], axis=1)
        mask &= own[:, None, :, None] == documents[:, None, None, :end]  # (B,1,b,S)
    return jnp.einsum("bhts,bhsd->bhtd", masked_softmax(scores, mask).astype(q.dtype), v)


def cudnn_refuses(queries: int, values: int, compute_capability: float) -> str | None:
    """Why cuDNN's fused attention does not take heads of these sizes, those of queries and keys and those of values.

    None: it takes them. The sizes are a multiple of 8 and at most 128, from Hopper (9.0) on 256: the condition of
    `jax.nn.dot_product_attention` in JAX 0.10 to 0.12. That function asks the default device, so 128 is the limit when
    compiling for a device that you do not have. cuDNN 9.10 takes 192 and 128 on Hopper, but the function takes one size
    alone: values are padded with zeros to the size of the queries.
    """
    most = 256 if compute_capability >= 9 else 128
    if values > queries:
        return f"cuDNN's kernel takes no heads of values that are larger than those of queries ({values}, {queries})"
    if queries % 8 or queries > most:
        return f"cuDNN's kernel takes heads of a multiple of 8 up to {most} here, and the model's have {queries}"
    return None


def cudnn_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T H h"],
    v: Float[Array, "B T H v"],
    attention_mask: Shaped[Array, "B T"] | None,
    scale: float,
) -> Float[Array, "B T H v"]:
    """`blocked_attention` by cuDNN's fused kernel, where it can: an even length, known to be so.

    Heads must be of sizes that it does not refuse (`cudnn_refuses`). It has no numbers of documents: it adds a mask
    (B,1,T,T) to the scores, which is made again in the backward pass.
    """
    if is_symbolic_dim(q.shape[1]) or q.shape[1] % 2:
        return blocked_attention(q, k, v, attention_mask, scale)
    same = None if attention_mask is None else attention_mask[:, None, :, None] == attention_mask[:, None, None]
    values = v.shape[-1]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - values)))
    attended = jax.nn.dot_product_attention(q, k, v, mask=same, scale=scale, is_causal=True, implementation="cudnn")
    return attended[..., :values]
