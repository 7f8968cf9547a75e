"""Evaluate a trained model on text: loss, perplexity, bits per byte.

python -m jaxllm.evaluate RUN --data FILE_OR_FOLDER_OR_HUB_NAME

Every token of the text is scored once. A window of --seq-len tokens begins with the last token of the one before it,
the first with the end-of-sequence token. Bits per byte compares models of different tokenizers.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from transformers import PreTrainedTokenizerBase

from jaxllm.command_line import parse
from jaxllm.config import Precision, TrainConfig
from jaxllm.config.fields import check_fields, option
from jaxllm.data.documents import DocumentEncoder, check_vocabulary
from jaxllm.data.encode import encoder_of
from jaxllm.data.sources import TextChunk, is_hub_name, open_source
from jaxllm.data.splits import ALL
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.generate import load_model, tokenizer_folder
from jaxllm.model.decoder import CustomLLM
from jaxllm.model.dtypes import Array
from jaxllm.model.inference import for_inference
from jaxllm.run.runtime import start_jax, use_compilation_cache
from jaxllm.store.folder import CONFIG_FILE, is_run, read_config
from jaxllm.train.loss import IGNORED
from jaxllm.train.step import summed_loss


class Scores(NamedTuple):
    nats: float  # summed cross-entropy
    tokens: int  # that were scored, ends of documents included
    text_bytes: int  # of the text, as UTF-8

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
    special_tokens: str = "text",
) -> Scores:
    """Score the chunks in order, until `max_tokens` tokens are reached.

    `special_tokens` is the run's `special_tokens_in_text`.

    Raises:
        UserError: there is no text, the tokenizer does not fit it or has no end token, or `seq_len` is beyond the
            model's positions.
    """
    limit = model.config.max_position_embeddings
    if not 2 <= seq_len <= limit:
        raise UserError(f"seq_len is {seq_len}: it must lie in 2 to max_position_embeddings = {limit}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, with which the first window begins")
    parts, tokens, text_bytes = [np.asarray([tokenizer.eos_token_id], np.int32)], 0, 0
    documents = DocumentEncoder(encoder_of(tokenizer, special_tokens))
    for chunk in chunks:
        if (ids := documents.add(chunk)) is None:
            continue
        parts.append(ids)
        tokens += len(ids)
        text = chunk.text if isinstance(chunk.text, str) else str(tokenizer.decode(ids))  # a chat through its template
        text_bytes += len(text.encode("utf-8"))
        if tokens >= max_tokens:
            break
    if not text_bytes:
        raise UserError("data: there is no text to evaluate on")
    parts.append(documents.flush())
    tokens += len(parts[-1])
    check_vocabulary(documents.counts)
    ids, step = np.concatenate(parts), seq_len - 1
    batch_size = min(batch_size, -(-tokens // step))
    rows = np.full((-(-tokens // (step * batch_size)) * batch_size, seq_len), IGNORED, np.int32)
    for row, start in zip(rows, range(0, tokens, step), strict=False):
        window = ids[start : start + seq_len]
        row[: len(window)] = window

    @nnx.jit
    def nats(model: CustomLLM, labels: Array) -> Array:
        return summed_loss(model, model.hidden_states(jnp.maximum(labels, 0))[0], labels)

    batches = rows.reshape(-1, batch_size, seq_len)
    return Scores(sum(float(nats(model, jnp.asarray(batch))) for batch in batches), tokens, text_bytes)


@dataclass(frozen=True)
class EvaluateArgs:
    """Evaluate a trained model on text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or an exported folder."""
    data: str | None = None
    """What train.py takes as --data; all of it is scored. Default: the held-out part of the run's data."""
    data_split: str | None = None
    """Split of --data; default: all of files, `train` of a Hub dataset."""
    text_field: str = "text"
    """Name of the field that holds the text, with --data."""
    seq_len: int | None = option(None, ge=2)
    """Tokens of a window; default: the run's, or the model's `max_position_embeddings`."""
    batch_size: int = option(8, ge=1)
    """Windows in a batch."""
    max_tokens: int = option(1_000_000, ge=1)
    """Stop after the chunk of text that reaches this many tokens."""
    precision: Precision = "float32"
    """Compute precision; bfloat16 needs half of the memory and reads half of the bytes."""

    def __post_init__(self) -> None:
        check_fields(self)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args: EvaluateArgs = parse(EvaluateArgs, argv, "python -m jaxllm.evaluate", __doc__)
    if args.data is None and (args.data_split is not None or args.text_field != "text"):
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
    model = for_inference(load_model(args.run, args.precision))
    tokenizer = load_tokenizer(str(tokenizer_folder(args.run)))
    if args.data is None and config is not None:
        chunks = open_source(config).held_out()
    else:
        assert args.data is not None
        split = args.data_split or ("train" if is_hub_name(args.data) else ALL)
        data = TrainConfig.from_options(
            data=args.data, data_split=split, text_field=args.text_field, hold_out="nothing"
        )
        source = open_source(data)
        for line in source.notes:
            print(f"Not read: {line}")
        chunks = source.chunks()
    seq_len = args.seq_len or (config.data.seq_len if config else model.config.max_position_embeddings)
    sizes = {"seq_len": seq_len, "batch_size": args.batch_size, "max_tokens": args.max_tokens}
    special_tokens = config.data.special_tokens_in_text if config else "text"
    found = score(model, tokenizer, chunks, **sizes, special_tokens=special_tokens)
    print(f"Tokens         {found.tokens:,} ({found.text_bytes:,} bytes of text)")
    print(f"Loss           {found.loss:.4f} nats per token")
    print(f"Perplexity     {found.perplexity:.2f}")
    print(f"Bits per byte  {found.bits_per_byte:.4f}")


if __name__ == "__main__":
    sys.exit(main())
