"""Evaluate a trained model on text: loss, perplexity, bits per byte.

python -m jaxllm.evaluate RUN --data FILE_OR_FOLDER_OR_HUB_NAME

Every token of the text is scored once. A window of --seq-len tokens begins with the last token of the one before it,
the first with the end-of-sequence token. Of chats, what the assistant says is scored, each chat on its own. Bits per
byte compares models of different tokenizers.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from transformers import PreTrainedTokenizerBase

from jaxllm.command_line import parse
from jaxllm.config import KernelsOption, Precision, TrainConfig
from jaxllm.config.fields import check_fields, option
from jaxllm.config.groups import JOINED_TEXTS, DataConfig
from jaxllm.data.documents import DocumentEncoder, check_vocabulary
from jaxllm.data.encode import encoder_of
from jaxllm.data.mixture import holds_chats
from jaxllm.data.packing import pack_in_order
from jaxllm.data.source import TextChunk
from jaxllm.data.sources import is_hub_name, open_source
from jaxllm.data.splits import ALL
from jaxllm.data.tokenizer import load_tokenizer, text_bytes
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.files import read_json
from jaxllm.generate import load_model, tokenizer_folder
from jaxllm.model.batch import IGNORED, TokenBatch, token_batch, token_ids
from jaxllm.model.decoder import CustomLLM
from jaxllm.model.dtypes import Array
from jaxllm.run.runtime import start_jax, use_compilation_cache
from jaxllm.store.folder import CONFIG_FILE, DATA_REPORT, is_run, read_config
from jaxllm.train.step import summed_loss


class Scores(NamedTuple):
    nats: float  # summed cross-entropy
    tokens: int  # that were scored, ends of documents included
    text_bytes: int  # of their text, as UTF-8
    read: int  # tokens, scored or not

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond that, a float overflows

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes


def score(
    model: CustomLLM,
    tokenizer: PreTrainedTokenizerBase,
    chunks: Iterator[TextChunk],
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    data: DataConfig = JOINED_TEXTS,
) -> Scores:
    """Score the chunks in order, until `max_tokens` tokens are reached.

    `data`: `special_tokens_in_text`, `train_on` and `documents` say how they are read.

    Raises:
        UserError: there is no text, the tokenizer does not fit it or has no end token, or `seq_len` is beyond the
            model's positions.
    """
    limit = model.config.max_position_embeddings
    if not 2 <= seq_len <= limit:
        raise UserError(f"seq_len is {seq_len}: it must lie in 2 to max_position_embeddings = {limit}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer of the model has no end-of-sequence token, with which the first window begins: add one to it"
        )
    parts, tokens, of_text = [], 0, 0
    documents = DocumentEncoder(encoder_of(tokenizer, data.special_tokens_in_text), data)
    for chunk in chunks:
        if (ids := documents.add(chunk)) is None:
            continue
        parts.append(ids)
        tokens += len(ids)
        text = chunk.text if isinstance(chunk.text, str) else str(tokenizer.decode(token_ids(ids)))  # by the template
        of_text += len(text.encode("utf-8"))
        if tokens >= max_tokens:
            break
    if not of_text:
        raise UserError("data: there is no text to evaluate on: pass other --data")
    parts.append(documents.flush())
    check_vocabulary(documents.counts)
    ids = np.concatenate(parts)
    rows = _rows(ids, tokenizer.eos_token_id, seq_len, data.documents == "separate")
    batch_size = min(batch_size, len(rows))
    rows = np.concatenate([rows, np.full((-len(rows) % batch_size, seq_len), IGNORED, np.int32)])
    labels = token_batch(rows, data).labels[:, 1:]
    if data.has_targets:
        of_text = text_bytes(tokenizer, labels[labels != IGNORED][None])

    @nnx.jit
    def nats(model: CustomLLM, batch: TokenBatch) -> Array:
        hidden = model.hidden_states(jnp.maximum(batch.ids, 0), batch.documents).last
        return summed_loss(model, hidden, batch.labels)

    batches = (token_batch(part, data) for part in rows.reshape(-1, batch_size, seq_len))
    total = sum(float(nats(model, jax.tree.map(jnp.asarray, batch))) for batch in batches)
    return Scores(total, int((labels != IGNORED).sum()), of_text, len(ids))


def _rows(ids: np.ndarray, start: Any, seq_len: int, is_separate: bool) -> np.ndarray:
    """Documents packed, or windows of their tokens, each of which begins with the last token of the one before it."""
    if is_separate:
        return pack_in_order(ids, seq_len, most=len(ids), is_separate=True)
    after_start, step = np.append(np.int32(start), ids), seq_len - 1
    rows = np.full((-(-len(ids) // step), seq_len), IGNORED, np.int32)
    for row, first in zip(rows, range(0, len(ids), step), strict=True):
        window = after_start[first : first + seq_len]
        row[: len(window)] = window
    return rows


@dataclass(frozen=True)
class EvaluateArgs:
    """Evaluate a trained model on text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or an exported folder."""
    data: str | None = None
    """What train.py takes as --data; all of it is scored. Default: the held-out part of the run's data."""
    data_split: str | None = None
    """Split of --data; default: all of files, `train` of a Hub dataset."""
    text_field: str | None = None
    """Name of the field that holds the text, with --data; default: text."""
    seq_len: int | None = option(None, ge=2)
    """Tokens of a window; default: the run's, or the model's `max_position_embeddings`."""
    batch_size: int = option(8, ge=1)
    """Windows in a batch."""
    max_tokens: int = option(1_000_000, ge=1)
    """Stop after the chunk of text that reaches this many tokens."""
    precision: Precision = "float32"
    """Compute precision; bfloat16 needs half of the memory and reads half of the bytes."""
    kernels: KernelsOption = "auto"
    """As in `python -m jaxllm.generate`."""

    def __post_init__(self) -> None:
        check_fields(self)


def _scored(run: Path, trained: DataConfig | None) -> dict[str, Any]:
    """The options for other chats: those of the run, if it was trained on chats or pairs."""
    file, read = run / DATA_REPORT, {}
    if trained is not None and file.is_file():
        read = read_json(file).get("encoded", {})
    if trained is None or not (read.get("chats") or read.get("pairs")):
        return {"train_on": "assistant", "documents": "separate"}
    return {"train_on": trained.train_on, "documents": trained.documents}


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args: EvaluateArgs = parse(EvaluateArgs, argv, "python -m jaxllm.evaluate", __doc__)
    if args.data is None and (args.data_split is not None or args.text_field is not None):
        name = "text_field" if args.data_split is None else "data_split"
        raise UserError(f"{name} is {getattr(args, name)!r}: it needs --data: pass --data, or leave it out")
    start_jax()
    use_compilation_cache()
    trained = is_run(args.run) and (args.run / CONFIG_FILE).is_file()
    if args.data is None and not trained:
        raise UserError(
            f"data is missing: {str(args.run)!r} is not a training run, so it holds out no data; pass --data"
        )
    config = read_config(args.run, TrainConfig) if trained else None
    model = load_model(args.run, args.precision, args.kernels)
    tokenizer = load_tokenizer(str(tokenizer_folder(args.run)))
    if args.data is None and config is not None:
        source, given = open_source(config.data, config.seed), config
        chunks, of_chats = source.held_out(), holds_chats(source)
    else:
        assert args.data is not None
        split = args.data_split or ("train" if is_hub_name(args.data) else ALL)
        special = config.data.special_tokens_in_text if config else "text"
        options: dict[str, Any] = {"data": args.data, "data_split": split, "hold_out": "nothing"}
        options |= {} if args.text_field is None else {"text_field": args.text_field}
        given = TrainConfig.from_options(**options, special_tokens_in_text=special)
        source = open_source(given.data, given.seed)
        for line in source.notes:
            print(f"Not read: {line}")
        if of_chats := holds_chats(source):
            given = given.with_options(**_scored(args.run, config and config.data))
        chunks = source.chunks()
    data = given.data
    seq_len = args.seq_len or (config.data.seq_len if config else model.config.max_position_embeddings)
    sizes = {"seq_len": seq_len, "batch_size": args.batch_size, "max_tokens": args.max_tokens}
    found = score(model, tokenizer, chunks, **sizes, data=data)
    if of_chats:
        what = "what the assistant says, or the completions" if data.train_on == "assistant" else "every token"
        print(f"Scored         {what}; documents {data.documents}")
    of = f"targets of {found.read:,} tokens; " if data.has_targets else ""
    print(f"Tokens         {found.tokens:,} ({of}{found.text_bytes:,} bytes of text)")
    print(f"Loss           {found.loss:.4f} nats per token")
    print(f"Perplexity     {found.perplexity:.2f}")
    print(f"Bits per byte  {found.bits_per_byte:.4f}")


if __name__ == "__main__":
    sys.exit(main())
