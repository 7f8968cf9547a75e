"""Rows of whole documents: best-fit packing, as they travel (`jaxllm.model.batch`)."""

from collections.abc import Iterable

import numpy as np

from jaxllm.model.batch import DOCUMENT_END, IGNORED


def first_piece(tokens: np.ndarray, seq_len: int) -> int:
    """How many tokens the first document has, or the part of it that fills a row; 0: its end is not there yet."""
    ends = np.flatnonzero(tokens[:seq_len] & DOCUMENT_END)
    if ends.size:
        return int(ends[0]) + 1
    return seq_len if len(tokens) >= seq_len else 0


def padded(piece: np.ndarray, seq_len: int) -> np.ndarray:
    """A document, or a part of one, as a row of its own: (n,) -> (T,)."""
    row = np.full(seq_len, IGNORED, np.int32)
    row[: len(piece)] = piece
    row[len(piece) - 1] |= DOCUMENT_END
    return row


def lengths_of(rows: np.ndarray) -> np.ndarray:
    """Tokens of rows without padding: (..., T) -> (...)."""
    return (rows != IGNORED).sum(axis=-1)


def best_fit(lengths: np.ndarray, passes: np.ndarray, room: int) -> int | None:
    """Of some documents, one of the oldest pass that has any that fits, the longest, the first of equals; None: none
    fits. (P,), (P,)."""
    fits = np.flatnonzero(lengths <= room)
    if not fits.size:
        return None
    return int(fits[np.lexsort((fits, -lengths[fits], passes[fits]))[0]])


def pack_in_order(documents: Iterable[np.ndarray], seq_len: int, most: int) -> np.ndarray:
    """Up to `most` rows of documents (n,), each of whose rows begins with the first that is left: (rows, T)."""
    pieces = []
    for document in documents:
        while size := first_piece(document, seq_len) or len(document):
            pieces.append(padded(document[:size], seq_len))
            document = document[size:]
    left = np.asarray([lengths_of(piece) for piece in pieces], np.int64)
    same_pass, taken = np.zeros(len(pieces), np.int64), seq_len + 1
    rows = []
    for first in range(len(pieces)):
        if left[first] == taken or len(rows) == most:
            continue
        row, used, choice = np.full(seq_len, IGNORED, np.int32), 0, first
        while choice is not None:
            length = int(left[choice])
            row[used : used + length] = pieces[choice][:length]
            used, left[choice] = used + length, taken
            choice = best_fit(left, same_pass, seq_len - used)
        rows.append(row)
    return np.asarray(rows, np.int32).reshape(-1, seq_len)
