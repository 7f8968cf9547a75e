"""From chunks of text to rows of tokens: tokenize, pack, shuffle; with a position that a checkpoint can keep.

Rows here are as they travel (`jaxllm.model.batch`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from jaxllm.config import RunConfig
from jaxllm.config.groups import JOINED_TEXTS, DataConfig
from jaxllm.data.chats import Text
from jaxllm.data.documents import DocumentEncoder
from jaxllm.data.encode import encoder_of
from jaxllm.data.packing import best_fit, first_piece, lengths_of, padded
from jaxllm.data.report import Counts
from jaxllm.data.source import CLOSING, Source, TextChunk
from jaxllm.data.sources import open_source
from jaxllm.errors import UserError, one_line
from jaxllm.files import read_bounded
from jaxllm.model.batch import are_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POSITION_FILE = "data_position.safetensors"
"""Name of an encoded position in a PyTorch checkpoint."""

MAX_POSITION_BYTES = 2**30
"""Far more than a pool of long rows and the tokens of the longest document take."""

POOL_ROWS = 1024
"""Rows, or separate documents, among which the next one is drawn, so that neighbours in a file are not in the same
batch."""


class Position(NamedTuple):
    """Everything that decides the batches to come.

    Its one encoding, in a checkpoint, in a file or between processes, is a safetensors file with the tensors `tokens`,
    `pool` and `passes`, and `state`: a JSON object with `source`, `drawn` and `text`, as UTF-8 bytes. Positions of
    earlier versions have no `passes` and `text`.
    """

    source: dict[str, Any]  # JSON values
    drawn: int  # rows, or separate documents, drawn so far: the number of the next random draw
    tokens: np.ndarray  # (n,) int32, tokens that are no row, or separate document, yet
    pool: np.ndarray  # (P,T) int32, rows that wait to be drawn; or one separate document in each, padded
    passes: np.ndarray | None = None  # (P+1,) int32, the pass in which each of them began, and that of `tokens`
    text: list[Any] | None = None  # `DocumentEncoder.state`

    def to_bytes(self) -> bytes:
        """Encode the position."""
        state = json.dumps({"source": self.source, "drawn": self.drawn, "text": self.text}).encode()
        arrays = {"tokens": self.tokens, "pool": self.pool} | ({} if self.passes is None else {"passes": self.passes})
        return save({"state": np.frombuffer(state, np.uint8)} | {k: np.ascontiguousarray(v) for k, v in arrays.items()})

    @classmethod
    def from_bytes(cls, encoded: bytes, where: str, seq_len: int, vocab_size: int) -> Position:
        """Decode a position of rows of `seq_len` tokens below `vocab_size`; `where` names it in messages.

        Raises:
            UserError: it is something else.
        """
        try:
            arrays = load(encoded)
            state = json.loads(arrays["state"].tobytes())
            known = state["source"], state["drawn"], arrays["tokens"], arrays["pool"]
            position = cls(*known, arrays.get("passes"), state.get("text"))
        except Exception as error:  # safetensors, json and NumPy raise kinds of their own
            raise UserError(f"the data position {where} cannot be read ({one_line(error)})") from None
        drawn = position.drawn
        fits = isinstance(position.source, dict) and type(drawn) is int and 0 <= drawn < 2**63
        if not fits or (position.tokens.ndim, position.pool.ndim) != (1, 2):
            raise UserError(f"{where} is no data position: its source, drawn, tokens or pool has another type")
        if not (position.passes is None or _are_passes(position)) or not (position.text is None or _is_text(position)):
            raise UserError(f"{where} is no data position: its passes or text has another type")
        if position.pool.shape[1] != seq_len:
            raise UserError(f"{where} has rows of {position.pool.shape[1]} tokens, and the run has seq_len = {seq_len}")
        for name, tokens in (("tokens", position.tokens), ("pool", position.pool)):
            if not are_rows(tokens, vocab_size):
                raise UserError(f"{where}: {name} must be int32 from 0 to below vocab_size = {vocab_size}")
        return position


def _are_passes(position: Position) -> bool:
    passes = position.passes
    return passes is not None and passes.dtype == np.int32 and passes.shape == (len(position.pool) + 1,)


def _is_text(position: Position) -> bool:
    text = position.text
    return isinstance(text, list) and [type(part) for part in text] == [str, int, int, int]


def read_position(file: Path, seq_len: int, vocab_size: int) -> Position:
    """Read the file of an encoded position.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    return Position.from_bytes(read_bounded(file, MAX_POSITION_BYTES), str(file), seq_len, vocab_size)


class TokenStream:
    """An endless stream of rows of `seq_len` tokens from the training part of a source.

    Joined documents, each followed by the end-of-sequence token, are cut into rows regardless of their borders, so
    there is no padding. The next row is drawn from a pool, which is then refilled. The random number depends only on
    the seed and the number of the draw. Rows of the oldest pass in the pool are drawn first, so that each row of a pass
    is drawn before any of the next one.

    Of separate documents the pool has one in each of its rows. The first of a row is drawn, and the rest of the row is
    filled with the longest that fit, those of the oldest pass first.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        seed: int,
        special_tokens: str = "text",
        data: DataConfig = JOINED_TEXTS,
    ):
        """`special_tokens`: the run's `special_tokens_in_text`. `data`: `train_on` and `documents` are read."""
        self._source, self._seq_len, self._seed = source, seq_len, seed
        self._data, self._is_separate = data, data.documents == "separate"
        self._documents = DocumentEncoder(encoder_of(tokenizer, special_tokens), data)
        self._by_pass = special_tokens != "earlier"
        self._tokens = np.zeros((0,), np.int32)
        self._pool = np.zeros((0, seq_len), np.int32)
        self._lengths = np.zeros((0,), np.int64)  # (P,), without padding
        self._passes = np.zeros((0,), np.int32)  # (P,), in which each of them began
        self._row_pass = self._tokens_pass = 0  # in which the last packed row began, and `tokens`
        self._drawn = 0
        self._rows = self._pack()

    def position(self) -> Position:
        # `tokens` is only sliced, never written to, so a long document is not copied for each of its rows
        source, text = copy.deepcopy(self._source.position), self._documents.state
        passes = np.append(self._passes, np.int32(self._tokens_pass))
        return Position(source, self._drawn, self._tokens, self._pool.copy(), passes, text)

    def seek(self, position: Position) -> None:
        """Continue from `position`, without reading what came before."""
        self._source.position = copy.deepcopy(position.source)
        self._drawn, self._tokens, self._pool = position.drawn, position.tokens, position.pool.copy()
        passes = np.zeros(len(self._pool) + 1, np.int32) if position.passes is None else position.passes
        self._passes, self._tokens_pass = passes[:-1].copy(), int(passes[-1])
        self._lengths = lengths_of(self._pool)
        self._documents = DocumentEncoder(self._documents.encoder, self._data)
        if position.text is not None:
            self._documents.state = position.text
        self._rows = self._pack()

    @property
    def counts(self) -> Counts:
        """What was encoded since the start of this process."""
        return self._documents.counts

    def progress(self) -> float | None:
        """Passes over the data by the rows that were drawn, without those in the pool; None: its size is not known."""
        read = self._source.progress()
        return None if read is None else read * self._drawn / max(1, self._drawn + len(self._pool))

    @property
    def oldest_pass(self) -> int:
        """The pass over the data whose rows are being drawn."""
        return int(self._passes.min(initial=self._tokens_pass))

    @property
    def skipped_rows(self) -> int:
        """Rows of the data that held no text, since the run began."""
        return self._source.position["skipped"]

    @property
    def left_out(self) -> dict[str, str]:
        """Files that turned out damaged and are no longer read, each with the reason."""
        return self._source.left_out

    def next_rows(self, count: int) -> np.ndarray:  # (count, T) int32
        if (missing := POOL_ROWS - len(self._pool)) > 0:
            new = [(next(self._rows), self._row_pass) for _ in range(missing)]
            self._pool = np.concatenate([self._pool, [row for row, _ in new]])
            self._passes = np.concatenate([self._passes, np.asarray([number for _, number in new], np.int32)])
            self._lengths = lengths_of(self._pool)
        return np.stack([self._filled() if self._is_separate else self._take(self._draw()) for _ in range(count)])

    def _draw(self) -> int:
        """Which row of the pool comes next."""
        among = np.flatnonzero(self._passes == self._passes.min()) if self._by_pass else np.arange(POOL_ROWS)
        random = np.random.Generator(np.random.Philox(key=self._seed, counter=self._drawn))
        return int(among[random.integers(len(among))])

    def _take(self, choice: int) -> np.ndarray:  # (T,) int32
        """A row of the pool, in whose place comes the next one."""
        row = self._pool[choice].copy()
        self._pool[choice] = new = next(self._rows)
        self._lengths[choice], self._passes[choice] = lengths_of(new), self._row_pass
        self._drawn += 1
        return row

    def _filled(self) -> np.ndarray:  # (T,) int32
        """A row of separate documents."""
        first = self._draw()
        used, row = int(self._lengths[first]), self._take(first)
        while (choice := best_fit(self._lengths, self._passes, self._seq_len - used)) is not None:
            length = int(self._lengths[choice])
            row[used : used + length] = self._take(choice)[:length]
            used += length
        return row

    def _pack(self) -> Iterator[np.ndarray]:
        yield from self._full_rows(self._tokens_pass)  # tokens of a seek, before another chunk is read
        empty_passes = 0
        while empty_passes < 2:  # the first may be the end of a pass, after a seek
            empty_passes += 1
            number = self._source.position["pass"]
            for chunk in self._source.chunks():
                if chunk.held_out:
                    continue
                if (tokens := self._documents.add(chunk)) is None:
                    position = self._source.position
                    if number == 0:  # a later pass skips the same
                        self._source.position = position | {"skipped": position["skipped"] + 1}
                    continue
                if chunk.part != CLOSING:
                    empty_passes = 0
                if not self._tokens.size:
                    self._tokens_pass = number
                self._tokens = np.concatenate([self._tokens, tokens])
                yield from self._full_rows(number)
        raise UserError("data: there is nothing to train on besides the held-out part: pass more text")

    def _full_rows(self, number: int) -> Iterator[np.ndarray]:
        """The rows that the tokens fill, or their separate documents; those after the first one begin in pass
        `number`."""
        while size := self._size():
            row, self._tokens = self._tokens[:size], self._tokens[size:]
            self._row_pass, self._tokens_pass = self._tokens_pass, number
            yield padded(row, self._seq_len) if self._is_separate else row

    def _size(self) -> int:
        """How many tokens the next row or separate document has; 0: they are not there yet."""
        if self._is_separate:
            return first_piece(self._tokens, self._seq_len)
        return self._seq_len if len(self._tokens) >= self._seq_len else 0


def encode(tokenizer: PreTrainedTokenizerBase, text: Text, ends_document: bool) -> np.ndarray | None:
    """Token ids of a whole text or chat: (n,) int32. None: the chat template does not take this chat.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    documents = DocumentEncoder(encoder_of(tokenizer))
    ids = documents.add(TextChunk(text, ends_document, held_out=False))
    return None if ids is None else np.concatenate([ids, documents.flush()])


def open_stream(config: RunConfig, tokenizer: PreTrainedTokenizerBase, shard: int = 0) -> TokenStream:
    """One of a run's data streams."""
    data, seed = config.data, config.seed + (shard << 64)
    source = open_source(config, shard, config.data_streams)
    return TokenStream(source, tokenizer, data.seq_len, seed, data.special_tokens_in_text, data)


class ProcessBatches:
    """One process's rows of every batch.

    A batch of B rows takes B/S rows, in order, from each of S = `data_streams` streams. So the batches depend on S and
    not on the number of processes. A process reads the streams of its rows; if it has only some rows of a stream, other
    processes read that stream too.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, first_row: int, rows: int):
        """The rows `first_row` to `first_row + rows - 1` of each micro-batch."""
        S = config.data_streams
        self._each = config.data.batch_size // S  # rows of a stream
        self._local = range(first_row, first_row + rows)
        self._streams = {
            s: open_stream(config, tokenizer, s)
            for s in range(first_row // self._each, -(-(first_row + rows) // self._each))
        }

    def next_rows(self, count: int) -> np.ndarray:
        """Rows of `count` micro-batches: (count * rows, T) int32."""
        parts = []
        for s, stream in self._streams.items():
            drawn = stream.next_rows(count * self._each).reshape(count, self._each, -1)
            start = s * self._each
            parts.append(drawn[:, max(0, self._local.start - start) : self._local.stop - start])
        return np.concatenate(parts, axis=1).reshape(count * len(self._local), -1)

    def position(self) -> dict[int, Position]:
        """Of each stream that is read here."""
        return {s: stream.position() for s, stream in self._streams.items()}

    def seek(self, positions: Sequence[Position]) -> None:
        """Continue from the positions of all S streams."""
        for s, stream in self._streams.items():
            stream.seek(positions[s])

    def progress(self) -> float | None:
        """Passes over the data by the rows that the slowest stream has drawn; None where its size is not known."""
        done = [stream.progress() for stream in self._streams.values()]
        known = [passes for passes in done if passes is not None]
        return min(known) if len(known) == len(done) else None

    @property
    def counts(self) -> Counts:
        """What the streams that are read here have encoded since the start of this process."""
        return sum((stream.counts for stream in self._streams.values()), Counts())

    @property
    def skipped_rows(self) -> int:
        """Rows of the data that held no text."""
        return sum(stream.skipped_rows for stream in self._streams.values())

    @property
    def left_out(self) -> dict[str, str]:
        """Files that turned out damaged and are no longer read, each with the reason."""
        return {name: reason for stream in self._streams.values() for name, reason in stream.left_out.items()}


def check_streams(config: RunConfig) -> None:
    """Check that each of several data streams has something to read.

    Raises:
        UserError: a shard of the data is empty.
    """
    S = config.data_streams
    for s in range(S if S > 1 else 0):
        if all(chunk.held_out or chunk.part == CLOSING for chunk in open_source(config, s, S).chunks()):
            raise UserError(
                f"data_streams is {S}: shard {s} of the data has nothing to train on; pass more text or fewer "
                "--data-streams"
            )
