"""From chunks of text to rows of tokens: tokenized, packed (`jaxllm.data.packing`), shuffled; and their position.

Rows have the form of `jaxllm.model.batch`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from jaxllm.config.groups import DataConfig
from jaxllm.data.documents import DocumentEncoder
from jaxllm.data.encode import encoder_of
from jaxllm.data.packing import Packer, filled_row, lengths_of
from jaxllm.data.source import CLOSING, Shard, Source
from jaxllm.data.sources import open_source
from jaxllm.errors import UserError, as_user_error, one_line
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
    tokens: np.ndarray  # (n,) int32, tokens that do not fill a row, or a separate document, yet
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
        with as_user_error(lambda error: f"the data position {where} cannot be read ({one_line(error)})"):
            arrays = load(encoded)
            state = json.loads(arrays["state"].tobytes())
            known = state["source"], state["drawn"], arrays["tokens"], arrays["pool"]
            position = cls(*known, arrays.get("passes"), state.get("text"))
        drawn = position.drawn
        fits = isinstance(position.source, dict) and type(drawn) is int and 0 <= drawn < 2**63
        if not fits or (position.tokens.ndim, position.pool.ndim) != (1, 2):
            raise UserError(f"{where} is not a data position: its source, drawn, tokens or pool has another type")
        if not (position.passes is None or _are_passes(position)) or not (position.text is None or _is_text(position)):
            raise UserError(f"{where} is not a data position: its passes or text has another type")
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
    """Read the file of an encoded position. Raises a UserError if it cannot be read, or holds something else."""
    return Position.from_bytes(read_bounded(file, MAX_POSITION_BYTES), str(file), seq_len, vocab_size)


class TokenStream:
    """An endless stream of rows of `data.seq_len` tokens from the training part of a source.

    The next row is drawn from a pool, which is then refilled. The random number depends only on the seed and the number
    of the draw. Rows of the oldest pass in the pool are drawn first, so that each row of a pass is drawn before any of
    the next one.

    Of separate documents the pool has one in each of its rows. The first of a row is drawn, and the rest of the row is
    filled with the longest that fit, those of the oldest pass first.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int):
        """`data`: how text is encoded and packed."""
        self._source, self._data, self._seed = source, data, seed
        self._is_separate = data.documents == "separate"
        self._documents = DocumentEncoder(encoder_of(tokenizer, data.special_tokens_in_text), data)
        self._packer = Packer(data.seq_len, self._is_separate)
        self._pool = np.zeros((0, data.seq_len), np.int32)
        self._lengths = np.zeros((0,), np.int64)  # (P,), without padding
        self._passes = np.zeros((0,), np.int32)  # (P,), in which each of them began
        self._drawn = 0
        self._rows = self._pack()

    def position(self) -> Position:
        source, text = copy.deepcopy(self._source.position), self._documents.state
        passes = np.append(self._passes, np.int32(self._packer.tokens_pass))
        return Position(source, self._drawn, self._packer.tokens, self._pool.copy(), passes, text)

    def seek(self, position: Position) -> None:
        """Continue from `position`, without reading what came before."""
        self._source.position = copy.deepcopy(position.source)
        self._drawn, self._pool = position.drawn, position.pool.copy()
        passes = np.zeros(len(self._pool) + 1, np.int32) if position.passes is None else position.passes
        self._packer.tokens, self._packer.tokens_pass = position.tokens, int(passes[-1])
        self._passes, self._lengths = passes[:-1].copy(), lengths_of(self._pool)
        self._documents = DocumentEncoder(self._documents.encoder, self._data)
        if position.text is not None:
            self._documents.state = position.text
        self._rows = self._pack()

    def progress(self) -> float | None:
        """Passes over the data by the rows that were drawn, without those in the pool; None: its size is not known."""
        read = self._source.progress()
        return None if read is None else read * self._drawn / max(1, self._drawn + len(self._pool))

    @property
    def oldest_pass(self) -> int:
        """The pass over the data whose rows are being drawn."""
        return int(self._passes.min(initial=self._packer.tokens_pass))

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
            new = [next(self._rows) for _ in range(missing)]
            self._pool = np.concatenate([self._pool, [row for row, _ in new]])
            self._passes = np.concatenate([self._passes, np.asarray([number for _, number in new], np.int32)])
            self._lengths = lengths_of(self._pool)
        return np.stack([self._next_row() for _ in range(count)])

    def _next_row(self) -> np.ndarray:  # (T,) int32
        first = self._draw()
        if not self._is_separate:
            return self._take(first)
        return filled_row(first, self._lengths, self._passes, self._data.seq_len, self._take)

    def _draw(self) -> int:
        """Which row of the pool comes next."""
        by_pass = self._data.special_tokens_in_text != "earlier"
        among = np.flatnonzero(self._passes == self._passes.min()) if by_pass else np.arange(POOL_ROWS)
        random = np.random.Generator(np.random.Philox(key=self._seed, counter=self._drawn))
        return int(among[random.integers(len(among))])

    def _take(self, choice: int) -> np.ndarray:  # (T,) int32
        """A row of the pool, in whose place comes the next one."""
        row = self._pool[choice].copy()
        self._pool[choice], self._passes[choice] = next(self._rows)
        self._lengths[choice] = lengths_of(self._pool[choice])
        self._drawn += 1
        return row

    def _pack(self) -> Iterator[tuple[np.ndarray, int]]:
        """The rows for the pool, each with the pass in which it began."""
        nothing = np.zeros(0, np.int32)
        yield from self._packer.add(nothing, self._packer.tokens_pass)  # tokens of a restored position come first
        empty_passes = 0
        while empty_passes < 2:  # the first may be the end of a pass, after a seek
            empty_passes += 1
            number = self._source.position["pass"]
            for chunk in self._source.chunks():
                if chunk.held_out:
                    continue
                if (tokens := self._documents.add(chunk)) is None:
                    position = self._source.position
                    if number == 0 and not chunk.repeated:  # later passes skip the same ones
                        self._source.position = position | {"skipped": position["skipped"] + 1}
                    continue
                if chunk.part != CLOSING:
                    empty_passes = 0
                yield from self._packer.add(tokens, number)
        raise UserError("data: there is nothing to train on besides the held-out part: pass more text")


def open_stream(data: DataConfig, seed: int, shard: Shard, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """The stream of a shard of a run's data."""
    return TokenStream(open_source(data, seed, shard), tokenizer, data, seed + (shard.number << 64))


class ProcessBatches:
    """One process's rows of every batch.

    A batch of B rows takes B/S rows, in order, from each of S = `data_streams` streams. So the batches depend on S and
    not on the number of processes. A process reads the streams of its rows; if it has only some rows of a stream, other
    processes read that stream too.
    """

    def __init__(
        self, data: DataConfig, seed: int, streams: int, tokenizer: PreTrainedTokenizerBase, first_row: int, rows: int
    ):
        """The rows `first_row` to `first_row + rows - 1` of each micro-batch."""
        self._each = data.batch_size // streams  # rows of a stream
        self._local = range(first_row, first_row + rows)
        self._streams = {
            s: open_stream(data, seed, Shard(s, streams), tokenizer)
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
    def skipped_rows(self) -> int:
        """Rows of the data that held no text."""
        return sum(stream.skipped_rows for stream in self._streams.values())

    @property
    def left_out(self) -> dict[str, str]:
        """Files that turned out damaged and are no longer read, each with the reason."""
        return {name: reason for stream in self._streams.values() for name, reason in stream.left_out.items()}


def check_streams(data: DataConfig, seed: int, streams: int) -> None:
    """Raise a UserError if one of several data streams has nothing to train on."""
    for s in range(streams if streams > 1 else 0):
        source = open_source(data, seed, Shard(s, streams))
        if all(chunk.held_out or chunk.part == CLOSING for chunk in source.chunks()):
            raise UserError(
                f"data_streams is {streams}: shard {s} of the data has nothing to train on; pass more text or fewer "
                "--data-streams"
            )
