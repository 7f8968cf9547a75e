"""Tokens packed into rows: joined documents are cut into full rows, separate ones fill a row whole, by best fit.

Rows have the form of `jaxllm.model.batch`.
"""

from collections.abc import Callable, Iterator

import numpy as np

from jaxllm.model.batch import DOCUMENT_END, IGNORED


class Packer:
    """Cuts a series of tokens into pieces.

    Of joined documents a piece is a full row, whatever ends in it, so there is no padding. Of separate documents it is
    one document, or as much of it as a row holds, padded.
    """

    def __init__(self, seq_len: int, is_separate: bool):
        self._seq_len, self._is_separate = seq_len, is_separate
        self.tokens = np.zeros((0,), np.int32)  # only sliced, never written to; they are not a whole piece yet
        self.tokens_pass = 0  # the pass over the data in which they began

    def add(self, tokens: np.ndarray, number: int) -> Iterator[tuple[np.ndarray, int]]:
        """The pieces (T,) that these tokens of pass `number` complete, each with the pass in which it began."""
        if not self.tokens.size:
            self.tokens_pass = number
        self.tokens = np.concatenate([self.tokens, tokens])
        while size := self._size():
            piece, self.tokens = self.tokens[:size], self.tokens[size:]
            began, self.tokens_pass = self.tokens_pass, number
            yield padded(piece, self._seq_len) if self._is_separate else piece, began

    def _size(self) -> int:
        """How many tokens the next piece has; 0: they are not there yet."""
        if self._is_separate:
            return first_document(self.tokens, self._seq_len)
        return self._seq_len if len(self.tokens) >= self._seq_len else 0


def first_document(tokens: np.ndarray, seq_len: int) -> int:
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


def filled_row(
    first: int, lengths: np.ndarray, passes: np.ndarray, seq_len: int, take: Callable[[int], np.ndarray]
) -> np.ndarray:
    """A row (T,) of separate documents: the first one, then the best fit for what is left until none fits.

    `take` returns a document, padded, and changes its entry of `lengths` and `passes` (P,): another takes its place.
    """
    row, used, choice = np.full(seq_len, IGNORED, np.int32), 0, first
    while choice is not None:
        length = int(lengths[choice])
        row[used : used + length] = take(choice)[:length]
        used += length
        choice = best_fit(lengths, passes, seq_len - used)
    return row


def best_fit(lengths: np.ndarray, passes: np.ndarray, room: int) -> int | None:
    """Of some documents, one of the oldest pass that has any that fits, the longest, the first of equals; None: none
    fits. (P,), (P,)."""
    fits = np.flatnonzero(lengths <= room)
    if not fits.size:
        return None
    return int(fits[np.lexsort((fits, -lengths[fits], passes[fits]))[0]])


def pack_in_order(tokens: np.ndarray, seq_len: int, most: int, is_separate: bool) -> np.ndarray:
    """Up to `most` rows of tokens (n,): (rows, T). A row of separate documents begins with the first that is left."""
    packer = Packer(seq_len, is_separate)
    pieces = [piece for piece, _ in packer.add(tokens, 0)]
    if not is_separate:
        return np.asarray(pieces[:most], np.int32).reshape(-1, seq_len)
    if packer.tokens.size:  # a document that is cut off
        pieces.append(padded(packer.tokens, seq_len))
    left = np.asarray([lengths_of(piece) for piece in pieces], np.int64)
    same_pass, taken = np.zeros(len(pieces), np.int64), seq_len + 1

    def take(choice: int) -> np.ndarray:
        left[choice] = taken
        return pieces[choice]

    rows = []
    for first in range(len(pieces)):
        if left[first] != taken and len(rows) < most:
            rows.append(filled_row(first, left, same_pass, seq_len, take))
    return np.asarray(rows, np.int32).reshape(-1, seq_len)
