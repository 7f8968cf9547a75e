"""Token ids of real text, for the comparison."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data.documents import DocumentEncoder, encoded
from jaxllm.data.encode import encoder_of
from jaxllm.data.lines import SUFFIXES
from jaxllm.data.sources import open_source
from jaxllm.data.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import StrPath

MAX_WORDS = 4096
"""The maximum vocabulary of a tokenizer trained for the comparison; a larger one only takes longer."""


def read_tokens(config: ModelConfig, count: int, text: StrPath | None, tokenizer: StrPath | None) -> np.ndarray:
    """Token ids of a text, repeated if it is shorter: (count,) int32.

    Args:
        text: a file; None: the standard library's source code.
        tokenizer: its folder; None: a tokenizer is trained on the text.

    Raises:
        UserError: the text cannot be read, or its tokens do not fit the model.
    """
    open_text = _opener(None if text is None else Path(text))
    if tokenizer is None:
        given = train_tokenizer(open_text(), min(config.vocab_size, MAX_WORDS))
    else:
        given = load_tokenizer(str(tokenizer))
    parts: list[np.ndarray] = []
    for ids in encoded(DocumentEncoder(encoder_of(given)), open_text().chunks()):
        parts.append(ids)
        if sum(map(len, parts)) >= count:
            break
    ids = np.concatenate(parts) if parts else np.zeros((0,), np.int32)
    if not len(ids):
        raise UserError(f"text is {str(text)!r}: it has no tokens to compare on")
    if ids.max() >= config.vocab_size:
        raise UserError(
            f"tokenizer {str(tokenizer)!r} has the token {ids.max()}, but the model's vocab_size is {config.vocab_size}"
        )
    return np.fromiter(itertools.islice(itertools.cycle(ids), count), np.int32, count)


def _opener(text: Path | None):
    if text is None:
        return lambda: open_source(DataConfig(), 0)
    if not text.is_file() or text.stat().st_size == 0:
        raise UserError(f"text is {str(text)!r}: it must be a file that holds text")
    endings = [suffix for suffix, kind in SUFFIXES.items() if kind == "text"]
    if text.suffix not in endings:
        raise UserError(f"text is {str(text)!r}: the ending must be one of {', '.join(endings)}")
    return lambda: open_source(DataConfig(source=str(text)), 0)
