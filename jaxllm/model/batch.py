"""Rows of tokens with their targets and documents: as they are stored, and as a step takes them. Imports no JAX.

The pool, data positions and the held-out part store one int32 a token: the id, with `NOT_TARGET` and `DOCUMENT_END` as
bits above it; IGNORED is padding. Rows of joined texts have neither bits nor padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxllm.config.groups import DataConfig

IGNORED = -100
"""Label of a position that is not a target, as in PyTorch and transformers; in stored rows, padding."""

DOCUMENT_END = 1 << 29
"""Set in the last token of a document; where documents are separate only."""

NOT_TARGET = 1 << 30
"""Set in a token whose prediction is not trained."""

_ID = DOCUMENT_END - 1


class TokenBatch(NamedTuple):
    """Arrays of NumPy or JAX, (..., T) int32. What is None is neither transferred nor computed with."""

    ids: Any  # where `targets` is None they are the labels, too: IGNORED is then no target, and read as token 0
    targets: Any = None  # the label of each token, not shifted: its id, or IGNORED
    documents: Any = None  # the number of each token's document, rising from 1; 0: padding

    @property
    def labels(self) -> Any:
        return self.ids if self.targets is None else self.targets


def token_batch(rows: np.ndarray, data: DataConfig) -> TokenBatch:
    """Travelling rows (..., T) of a run as its step takes them: with targets and documents where the run needs them.

    The first token of a separate document is not a target: no token predicts it.
    """
    if not data.has_targets:
        return TokenBatch(rows)
    padding, ids = rows == IGNORED, token_ids(rows)
    targets = np.where(padding | (rows & NOT_TARGET != 0), IGNORED, ids)
    if data.documents != "separate":
        return TokenBatch(ids, targets)
    begins = np.ones(rows.shape, bool)
    begins[..., 1:] = rows[..., :-1] & DOCUMENT_END != 0
    documents = np.where(padding, 0, np.cumsum(begins, axis=-1, dtype=np.int32))
    return TokenBatch(ids, np.where(begins, IGNORED, targets), documents)


def token_ids(rows: np.ndarray) -> np.ndarray:
    """The ids of stored tokens; 0 for padding."""
    return np.where(rows == IGNORED, 0, rows & _ID)


def are_rows(rows: np.ndarray, vocab_size: int) -> bool:
    """Whether an array holds stored tokens of a vocabulary."""
    if rows.dtype != np.int32:
        return False
    tokens = rows[rows != IGNORED]
    return not tokens.size or bool(tokens.min() >= 0 and (tokens & _ID).max() < vocab_size)
