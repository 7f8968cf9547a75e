"""Text generation: one prefill of all prompts, then a compiled loop of single tokens on the latent cache.

python -m jaxllm.generate RUN --prompt "def " --max-new-tokens 100 --temperature 0.8 --top-p 0.95
python -m jaxllm.generate RUN --chat
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from jaxllm.command_line import parse
from jaxllm.config import MAX_INT, MAX_SEED, Precision
from jaxllm.config.fields import check_fields, option
from jaxllm.config.groups import MAX_TEMPERATURE, check_temperature
from jaxllm.data.encode import encoder_of
from jaxllm.data.tokenizer import decode_after, encode_prompt, load_tokenizer
from jaxllm.errors import UserError, exit_on_user_error, shown
from jaxllm.files import StrPath
from jaxllm.model.attention import Latents
from jaxllm.model.decoder import CustomLLM, abstract_model, split_model
from jaxllm.model.dtypes import Array, check_dtype
from jaxllm.model.inference import for_compute
from jaxllm.model.kernels.packed import pack, unpack
from jaxllm.model.numerics import pinned_sampling, random_key
from jaxllm.packages import check_own
from jaxllm.run.runtime import start_jax, use_compilation_cache
from jaxllm.store.checkpoint import load_weights
from jaxllm.store.folder import SOURCE, TOKENIZER, is_run, read_model_config
from jaxllm.store.source import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple of this many tokens, so that few lengths are compiled."""

STREAMED_TOKENS = 8
"""Tokens that are generated before they are shown."""


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


class _Decoding(NamedTuple):
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
    width = min(limit, -(-max(lengths) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    graph, params, bias = split_model(model)
    eos = np.asarray([-1, *eos_token_ids], np.int32)
    with pinned_sampling():
        tokens, count = _generate(
            graph, sampling.kind, max_new_tokens, sampling.numbers(), params, bias, padded, np.asarray(lengths), eos,
            random_key(seed),
        )  # fmt: skip
    rows = np.asarray(tokens)[:, : int(count)].tolist()
    return [list(itertools.takewhile(lambda token: token not in eos_token_ids, row)) for row in rows]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    graph: nnx.GraphDef,
    kind: SamplingKind,
    max_new: int,
    numbers: _Numbers,
    params,
    bias,
    prompts: Array,
    lengths: Array,
    eos: Array,
    key: Array,
) -> tuple[Array, Array]:
    """Prompts (B,P), padded on the right, and their lengths (B,) -> (B, max_new) tokens and how many count.

    `eos` are the tokens that end a row.
    """
    model = nnx.merge(graph, params, bias)
    batch = prompts.shape[0]
    hidden, cache = prefill(model, prompts, max_new)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)  # (B,1,D)
    first = sample_token(kind, numbers, model.logits(last)[:, 0], jax.random.fold_in(key, 0))
    tokens = jnp.zeros((batch, max_new), jnp.int32).at[:, 0].set(first)

    def unfinished(now: _Decoding) -> Array:
        return (now.count < max_new) & ~now.done.all()

    def next_token(now: _Decoding) -> _Decoding:
        logits, cache = model.decode(now.token[:, None], now.positions[:, None], unpack(now.cache))
        token = sample_token(kind, numbers, logits[:, 0], jax.random.fold_in(key, now.count))
        return _Decoding(
            count=now.count + 1,
            tokens=now.tokens.at[:, now.count].set(token),
            token=token,
            positions=now.positions + 1,
            done=now.done | jnp.isin(token, eos),
            cache=pack(cache),
        )

    start = _Decoding(jnp.ones((), jnp.int32), tokens, first, lengths, jnp.isin(first, eos), pack(cache))
    end = jax.lax.while_loop(unfinished, next_token, start)
    return end.tokens, end.count


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


def load_model(folder: StrPath, precision: Precision = "float32") -> CustomLLM:
    """The model of a run or of an exported folder; raises a UserError if the folder is neither.

    Its matrices are held in bfloat16 for that precision, else in the dtype in which they are stored.
    """
    dtype = check_dtype(precision, "precision")
    if not is_run(folder):
        if not Path(folder).is_file():
            read_model_config(folder)  # nothing to convert
        check_own("convert")
        from convert.to_flax import model_of

        return model_of(folder, dtype, for_compute(dtype))
    config, weights = load_weights(folder, for_compute(dtype))
    graph, _, _ = abstract_model(config, dtype=dtype)
    return nnx.merge(graph, *weights)


def tokenizer_folder(folder: StrPath) -> Path:
    """The folder of the tokenizer of a run, or of an exported folder or one in the Hub's cache."""
    kept = (Path(folder, name) for name in (TOKENIZER, SOURCE) if is_run(folder))
    return next((path for path in kept if path.is_dir()), model_folder(folder))


def stream(
    model: CustomLLM,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int,
    eos_token_ids: Sequence[int],
) -> Iterator[list[int]]:
    """Continue one prompt: yields new tokens, a few at a time, until an end token or the model's last position."""
    room = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
    while room > 0:
        count = min(room, STREAMED_TOKENS)
        now = (seed + len(prompt)) % (MAX_SEED + 1)
        new = generate(model, [prompt], count, sampling, seed=now, eos_token_ids=eos_token_ids)[0]
        yield new
        prompt, room = prompt + new, room - count if len(new) == count else 0


def chat(args: GenerateArgs, model: CustomLLM, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
    """Answer the lines of stdin until it ends; with a chat template as a conversation, else each line as a prompt."""
    turns: list[dict[str, str]] = []
    encoder, eos = encoder_of(tokenizer, args.special_tokens_in_text), end_tokens(args, model, tokenizer)
    print(f"One line is one {'message' if tokenizer.chat_template else 'prompt'}; Ctrl-D ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        turns.append({"role": "user", "content": line})
        ids = encode_prompt(tokenizer, line, args.special_tokens_in_text)
        while tokenizer.chat_template:
            ids = encoder.chat_ids(turns, add_generation_prompt=True).tolist()
            if len(turns) == 1 or len(ids) + args.max_new_tokens <= model.config.max_position_embeddings:
                break
            del turns[:2]  # the oldest message and its answer
        if len(ids) >= model.config.max_position_embeddings:
            print(f"(that line is too long: max_position_embeddings is {model.config.max_position_embeddings})")
        said, printed = [], ""
        for new in stream(model, ids, args.max_new_tokens, sampling, seed=args.seed, eos_token_ids=eos):
            said += new
            text = str(tokenizer.decode(said)).rstrip("\ufffd")  # the rest of a character is still to come
            print(text[len(printed) :], end="", flush=True)
            printed = text
        print()
        turns.append({"role": "assistant", "content": printed})


@dataclass(frozen=True)
class GenerateArgs:
    """Continue prompts with a trained model."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or an exported folder."""
    prompt: tuple[str, ...] = ("",)
    """One or more prompts."""
    chat: bool = False
    """Answer what is typed, line by line, in place of --prompt."""
    special_tokens_in_text: Literal["text", "keep"] = "text"
    """What becomes of special tokens that a prompt or a message spells: `text`, encoded as other characters are, or
    `keep`, control tokens."""
    max_new_tokens: int = option(100, ge=1)
    """Most tokens to add to a prompt."""
    temperature: float = option(0.8, ge=0, le=MAX_TEMPERATURE)
    """0 is greedy."""
    top_k: int = option(0, ge=0)
    """0: all tokens."""
    top_p: float = option(0.95, gt=0, le=1)
    """Only the likeliest tokens that together reach this probability."""
    greedy: bool = False
    """Always the likeliest token."""
    seed: int = option(0, ge=0, le=MAX_SEED)
    """Of the random choices."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token."""
    precision: Precision = "float32"
    """Compute precision; bfloat16 needs half of the memory and reads half of the bytes."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_temperature(self.temperature)


def end_tokens(args: GenerateArgs, model: CustomLLM, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's, and those that the model's config.json names."""
    own: Any = tokenizer.eos_token_id
    return () if args.ignore_eos else tuple({own, *model.config.eos_token_ids} - {None})


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args: GenerateArgs = parse(GenerateArgs, argv, "python -m jaxllm.generate", __doc__)
    start_jax()
    use_compilation_cache()
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    model = load_model(args.run, args.precision)
    tokenizer = load_tokenizer(str(tokenizer_folder(args.run)))
    if args.chat:
        chat(args, model, tokenizer, sampling)
        return
    prompts = [encode_prompt(tokenizer, prompt, args.special_tokens_in_text) for prompt in args.prompt]
    eos = end_tokens(args, model, tokenizer)
    made = generate(model, prompts, args.max_new_tokens, sampling, seed=args.seed, eos_token_ids=eos)
    for text, prompt, new in zip(args.prompt, prompts, made, strict=True):
        print(text + decode_after(tokenizer, prompt, new))


if __name__ == "__main__":
    sys.exit(main())
