"""Decoding: one prefill of all prompts, then a compiled loop over single tokens on the latent cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.config import MAX_INT, MAX_SEED
from jaxllm.config.fields import check_fields, option
from jaxllm.config.groups import MAX_TEMPERATURE, check_temperature
from jaxllm.errors import UserError, shown
from jaxllm.model.attention import Latents
from jaxllm.model.decoder import CustomLLM, split_model
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.kernels.packed import pack, unpack
from jaxllm.model.numerics import pinned_sampling, random_key

PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple of this many tokens, so that few lengths are compiled."""

STREAMED_TOKENS = 8
"""Tokens that `stream` decodes before it yields them."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = option(1.0, ge=0, le=MAX_TEMPERATURE)
    """Divides the logits; 0 is greedy."""
    top_k: int = option(0, ge=0)
    """Only the k likeliest tokens; 0: all."""
    top_p: float = option(1.0, gt=0, le=1)
    """Only the likeliest tokens that together reach this probability (nucleus sampling, arXiv:1904.09751)."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_temperature(self.temperature)

    @property
    def kind(self) -> SamplingKind:
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 else "all"

    def numbers(self) -> _Numbers:
        """What the compiled program takes as arguments, so that another temperature compiles nothing."""
        return _Numbers(np.float32(self.temperature), np.int32(self.top_k or MAX_INT), np.float32(self.top_p))


SamplingKind = Literal["greedy", "all", "filtered"]
"""Decides what is compiled: the likeliest token, or a random one of all, or of those that top_k and top_p leave."""


class _Numbers(NamedTuple):
    temperature: np.float32 | Array
    top_k: np.int32 | Array  # all tokens: larger than any vocabulary
    top_p: np.float32 | Array


class _Choice(NamedTuple):
    """How tokens are chosen and rows end; arguments of the compiled programs."""

    numbers: _Numbers
    key: Array
    eos: np.ndarray | Array  # (E,) the tokens that end a row


class _Decoding(NamedTuple):
    """Rows that are being continued."""

    count: Array  # () tokens chosen so far
    tokens: Array  # (B,X) the chosen tokens, X at most
    token: Array  # (B,) the newest
    positions: Array  # (B,) its position, which is its cache slot
    done: Array  # (B,) whether an end-of-sequence token was chosen
    cache: Latents  # (L,B,S,...), packed


def generate(
    model: CustomLLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(temperature=0.0),
    *,
    seed: int = 0,
    eos_token_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Continue prompts of any lengths, all at once.

    Args:
        prompts: token ids, at least one in each prompt.
        max_new_tokens: most tokens to add.
        sampling: how a token is chosen; greedy by default.
        seed: of the random choices, below 2**63.
        eos_token_ids: each stops a row when chosen, and is not returned.

    Returns the new tokens of each prompt. Raises a UserError if a prompt is empty, or if it does not fit into the
    model's positions with its new tokens.
    """
    (rows,) = _decode(model, prompts, max_new_tokens, max_new_tokens, sampling, seed, eos_token_ids)
    return [_before_end(row, eos_token_ids) for row in rows]


def stream(
    model: CustomLLM,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int,
    eos_token_ids: Sequence[int],
) -> Iterator[list[int]]:
    """Continue one prompt: yields the tokens of `generate`, a few at a time, as far as the model's positions go."""
    room = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
    if room < 1:
        return
    yielded = 0
    for (row,) in _decode(model, [prompt], room, STREAMED_TOKENS, sampling, seed, eos_token_ids):
        tokens = _before_end(row, eos_token_ids)
        yield tokens[yielded:]
        yielded = len(tokens)


def _before_end(tokens: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in eos_token_ids, tokens))


def _decode(
    model: CustomLLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    every: int,
    sampling: Sampling,
    seed: int,
    eos_token_ids: Sequence[int],
) -> Iterator[list[list[int]]]:
    """Yields all new tokens of each prompt so far, after every `every` tokens and at the end.

    The arguments and errors are those of `generate`. Tokens after a row's end are to be ignored.
    """
    _check(model, prompts, max_new_tokens, seed)
    lengths = np.asarray([len(prompt) for prompt in prompts])
    width = min(model.config.max_position_embeddings, -(-lengths.max() // PROMPT_MULTIPLE) * PROMPT_MULTIPLE)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    graph, params, bias = split_model(model)
    eos = np.asarray([-1, *eos_token_ids], np.int32)
    with pinned_sampling():
        choice = _Choice(sampling.numbers(), random_key(seed), eos)
        now = _first_token(graph, sampling.kind, max_new_tokens, choice, params, bias, padded, lengths)
    for until in itertools.count(every, every):
        with pinned_sampling():
            now = _more_tokens(graph, sampling.kind, choice, params, bias, min(until, max_new_tokens), now)
        yield np.asarray(now.tokens)[:, : int(now.count)].tolist()
        if until >= max_new_tokens or now.done.all():
            return


def _check(model: CustomLLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {shown(seed)}: it must lie in 0 to {MAX_SEED}")
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise UserError("prompt is empty: it must have at least one token")
    limit = model.config.max_position_embeddings
    if max(lengths) >= limit:
        raise UserError(
            f"prompt has {max(lengths)} tokens: it must have at most {limit - 1}, as max_position_embeddings is {limit}"
        )
    if max(lengths) + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}: with a prompt of {max(lengths)} tokens it must be at most "
            f"{limit - max(lengths)}, as max_position_embeddings is {limit}"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first_token(
    graph: nnx.GraphDef,
    kind: SamplingKind,
    max_new: int,
    choice: _Choice,
    params: Pytree,
    bias: Pytree,
    prompts: Array,
    lengths: Array,
) -> _Decoding:
    """Read prompts (B,P), padded on the right, of lengths (B,), and choose the first token of `max_new` after each."""
    model = nnx.merge(graph, params, bias)
    hidden, cache = prefill(model, prompts, max_new)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)  # (B,1,D)
    first = sample_token(kind, choice.numbers, model.logits(last)[:, 0], jax.random.fold_in(choice.key, 0))
    tokens = jnp.zeros((prompts.shape[0], max_new), jnp.int32).at[:, 0].set(first)
    return _Decoding(jnp.ones((), jnp.int32), tokens, first, lengths, jnp.isin(first, choice.eos), pack(cache))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def _more_tokens(
    graph: nnx.GraphDef, kind: SamplingKind, choice: _Choice, params: Pytree, bias: Pytree, until: int, now: _Decoding
) -> _Decoding:
    """Choose tokens until each row has `until`, or all rows have ended."""
    model = nnx.merge(graph, params, bias)

    def unfinished(now: _Decoding) -> Array:
        return (now.count < until) & ~now.done.all()

    def next_token(now: _Decoding) -> _Decoding:
        logits, cache = model.decode(now.token[:, None], now.positions[:, None], unpack(now.cache))
        token = sample_token(kind, choice.numbers, logits[:, 0], jax.random.fold_in(choice.key, now.count))
        return _Decoding(
            count=now.count + 1,
            tokens=now.tokens.at[:, now.count].set(token),
            token=token,
            positions=now.positions + 1,
            done=now.done | jnp.isin(token, choice.eos),
            cache=pack(cache),
        )

    return jax.lax.while_loop(unfinished, next_token, now)


def prefill(model: CustomLLM, prompts: Array, max_new: int) -> tuple[Array, Latents]:
    """One pass over prompts (B,P), padded on the right: the layers' output (B,P,D), and the cache.

    The cache has slots for the prompts and `max_new` tokens after the longest, as far as the model's positions go.
    Padding on the right needs no mask: no token sees what comes after it, and decoding overwrites those slots.
    """
    hidden, record = model.hidden_states(prompts, keep_latents=True)
    width = prompts.shape[1]
    room = [(0, 0), (0, 0), (0, max(0, min(width + max_new, model.config.max_position_embeddings) - width))]
    return hidden, jax.tree.map(lambda x: jnp.pad(x, room + [(0, 0)] * (x.ndim - 3)), record.latents)


def sample_token(kind: SamplingKind, numbers: _Numbers, logits: Array, key: Array) -> Array:
    """Choose a token for each row: (B,V) float32 -> (B,) int32."""
    if kind == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / numbers.temperature
    if kind == "filtered":
        logits = _filtered(numbers, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _filtered(numbers: _Numbers, logits: Array) -> Array:
    """Logits (B,V) with -inf for the tokens that top_k and top_p leave out; of equal tokens the first ones stay."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    among_k = jnp.arange(logits.shape[-1]) < numbers.top_k
    probabilities = jax.nn.softmax(jnp.where(among_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    stay = among_k & ((before < numbers.top_p) | (numbers.top_p == 1))  # rounding takes `before` to 1 and beyond
    count = jnp.maximum(stay.sum(axis=-1, keepdims=True), 1)  # (B,1)
    smallest = jnp.take_along_axis(ordered, count - 1, axis=-1)
    equal, larger = logits == smallest, logits > smallest
    first_equal = equal & (jnp.cumsum(equal, axis=-1) <= count - larger.sum(axis=-1, keepdims=True))
    return jnp.where(larger | first_equal, logits, -jnp.inf)
