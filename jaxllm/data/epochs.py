"""The steps of a run whose length is given in passes over its data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxllm.config import RunConfig
from jaxllm.data.documents import DocumentEncoder, encoded
from jaxllm.data.encode import encoder_of
from jaxllm.data.sources import open_source
from jaxllm.data.stream import open_stream
from jaxllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def steps_for_epochs(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Steps after which the largest data stream has been trained on `epochs` times. Reads and encodes all of it.

    Raises:
        UserError: nobody knows how much it is.
    """
    S, epochs, data = config.data_streams, config.schedule.epochs or 1.0, config.data
    if open_source(config).progress() is None:
        raise UserError(f"epochs is {epochs:g}: the size of the dataset {data.source!r} is not known: pass --steps")
    if data.documents == "separate":
        rows = max(_rows_of_a_pass(config, tokenizer, s) for s in range(S))
        what = f"{rows:,} rows of its largest part"
    else:
        tokens = []
        for s in range(S):
            documents = DocumentEncoder(encoder_of(tokenizer, data.special_tokens_in_text), data)
            chunks = (chunk for chunk in open_source(config, s, S).chunks() if not chunk.held_out)
            tokens.append(sum(map(len, encoded(documents, chunks))))
        rows, what = max(tokens) / data.seq_len, f"{sum(tokens):,} tokens"
    each = data.grad_accum * data.batch_size // S
    steps = max(1, math.ceil(epochs * rows / each))
    print(f"A pass over the data is {what}: --epochs {epochs:g} is --steps {steps}")
    return steps


def _rows_of_a_pass(config: RunConfig, tokenizer: PreTrainedTokenizerBase, shard: int) -> int:
    """Rows in which a stream packs the separate documents of its first pass."""
    stream, rows = open_stream(config, tokenizer, shard), 0
    while stream.oldest_pass == 0:
        stream.next_rows(1)
        rows += 1
    return rows
