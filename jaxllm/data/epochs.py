"""The steps of a run whose length is given in passes over its data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxllm.config.groups import DataConfig
from jaxllm.data.documents import DocumentEncoder, encoded
from jaxllm.data.encode import encoder_of
from jaxllm.data.source import Shard
from jaxllm.data.sources import open_source
from jaxllm.data.stream import open_stream
from jaxllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def steps_for_epochs(
    epochs: float, data: DataConfig, seed: int, streams: int, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Steps after which the largest data stream has been trained on `epochs` times. Reads and encodes all of it.

    Raises:
        UserError: the size of the data is not known.
    """
    if open_source(data, seed).progress() is None:
        raise UserError(f"epochs is {epochs:g}: the size of the dataset {data.source!r} is not known: pass --steps")
    shards = [Shard(s, streams) for s in range(streams)]
    if data.documents == "separate":
        rows = max(_rows_of_a_pass(data, seed, shard, tokenizer) for shard in shards)
        what = f"{rows:,} rows of its largest part"
    else:
        tokens = []
        for shard in shards:
            documents = DocumentEncoder(encoder_of(tokenizer, data.special_tokens_in_text), data)
            chunks = (chunk for chunk in open_source(data, seed, shard).chunks() if not chunk.held_out)
            tokens.append(sum(map(len, encoded(documents, chunks))))
        rows, what = max(tokens) / data.seq_len, f"{sum(tokens):,} tokens"
    each = data.grad_accum * data.batch_size // streams
    steps = max(1, math.ceil(epochs * rows / each))
    print(f"A pass over the data is {what}: --epochs {epochs:g} is --steps {steps}")
    return steps


def _rows_of_a_pass(data: DataConfig, seed: int, shard: Shard, tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows in which a stream packs the separate documents of its first pass."""
    stream, rows = open_stream(data, seed, shard, tokenizer), 0
    while stream.oldest_pass == 0:
        stream.next_rows(1)
        rows += 1
    return rows
