"""The small model and the small run of the tests; each test says what is different in its own."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxllm.config import ModelConfig, RunConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data.chats import Text
from jaxllm.data.documents import DocumentEncoder, encoded
from jaxllm.data.encode import encoder_of
from jaxllm.data.held_out import HeldOut, read_held_out
from jaxllm.data.source import WHOLE, Shard, Source, TextChunk
from jaxllm.data.sources import open_source

SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    moe_intermediate_size=24,
    max_position_embeddings=64,
)


def small(**changes: Any) -> ModelConfig:
    """The small model, with other values of some fields."""
    return dataclasses.replace(SMALL, **changes)


NARROW_MODEL = (
    "--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.num-attention-heads", "2",
    "--model.moe-intermediate-size", "24", "--model.n-routed-experts", "4", "--model.vocab-size", "300",
    "--model.max-position-embeddings", "64", "--seq-len", "16",
)  # fmt: skip
"""Options of a run that takes seconds; of an option that is given twice, the last value counts."""

NARROW = (
    *NARROW_MODEL, "--batch-size", "4", "--log-every", "1", "--eval-samples", "7", "--sample-tokens", "8",
    "--precision", "float32", "--optimizer", "adamw", "--learning-rate", "4e-3",  # compiles faster than the default
)  # fmt: skip
"""The same with the rest, without data and steps."""


def open_files(path: Path, shard: Shard = WHOLE) -> Source:
    """The text of a file or a folder as a source, without options."""
    return open_source(DataConfig(source=str(path)), 0, shard)


def held_out_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """What a run with this config is evaluated on."""
    return read_held_out(config.data, config.logging.eval_samples, config.data_streams, tokenizer)


def encode(tokenizer: PreTrainedTokenizerBase, text: Text, ends_document: bool) -> np.ndarray:
    """Token ids of a whole text or chat: (n,) int32."""
    return np.concatenate([*encoded(DocumentEncoder(encoder_of(tokenizer)), [TextChunk(text, ends_document, False)])])
