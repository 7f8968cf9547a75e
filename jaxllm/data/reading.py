"""Reading one file of text, JSONL or parquet from any offset, so that a resumed run reads nothing twice.

An offset is a byte of a text or JSONL file, and a row of a parquet file.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jaxllm.errors import UserError, listed, one_line

SUFFIXES = {".txt": "text", ".md": "text", ".py": "text", ".text": "text", ".jsonl": "jsonl", ".parquet": "parquet"}

CHUNK_CHARS = 4096
"""Largest chunk of a text file, so that a file of any size can be read."""

MAX_ROW_BYTES = 64 << 20
"""A longer line of a JSONL file is skipped: it is no document, and may not fit in memory."""

BLOCK = 1 << 16
"""Bytes that are read at once."""

BATCH_ROWS = 1024
"""Rows of a parquet file that are decoded at once."""

_LINE_END = re.compile(rb"\r\n?|\n")


class FileChunk(NamedTuple):
    """A chunk of a text file, or a row."""

    text: str | None  # None: a row without text
    ends_document: bool
    offset: int  # where the next one starts
    done: int  # bytes of the file up to there; of a parquet file, its share of the rows


def read_chunks(file: Path, size: int, offset: int, text_field: str) -> Iterator[FileChunk]:
    """The chunks of a file from an offset on.

    Raises:
        UserError: it cannot be read, has no such field, or is no longer of the size it had.
    """
    try:
        with file.open("rb") as opened:
            now = os.fstat(opened.fileno()).st_size
            if now != size:
                raise UserError(
                    f"data: {file} has changed since the run read it ({size} bytes, now {now}): "
                    "put the old file back, or pass --overwrite to start over"
                )
            kind = SUFFIXES[file.suffix]
            if kind == "text":
                yield from _chunks(opened, offset)
            elif kind == "jsonl":
                yield from _json_rows(opened, offset, text_field)
            else:
                yield from _parquet_rows(opened, file, size, offset, text_field)
    except OSError as error:
        raise UserError(f"data: cannot read {file}: {one_line(error)}") from None


class Lines:
    """Lines of a file from an offset on. They end as in Python's text mode: at \\n, \\r or \\r\\n."""

    def __init__(self, opened: BinaryIO, offset: int):
        self.offset = offset  # of the next line
        self._opened = opened
        self._buffer, self._start = b"", 0  # what is read and not taken begins at `start`
        opened.seek(offset)

    def take(self, most: int) -> bytes:
        """The rest of a line with its end, or the first `most` bytes of that; nothing at the end of the file."""
        searched = 0
        while True:
            have = len(self._buffer) - self._start
            found = _LINE_END.search(self._buffer, self._start + searched)
            # a \r at the end of the buffer may be followed by its \n
            if found and (found.end() < len(self._buffer) or found[0] != b"\r"):
                return self._advance(min(found.end() - self._start, most))
            if have > most:
                return self._advance(most)
            block = self._opened.read(max(BLOCK, have))  # as much again: a long line is copied a few times only
            if not block:
                return self._advance(min(have, most))
            self._buffer, self._start = self._buffer[self._start :] + block, 0
            searched = max(0, have - 1)

    def unread(self, count: int) -> None:
        """Return the last `count` bytes, which were not used."""
        self._start -= count
        self.offset -= count

    def _advance(self, count: int) -> bytes:
        taken = self._buffer[self._start : self._start + count]
        self._start += count
        self.offset += count
        return taken


def _chunks(opened: BinaryIO, offset: int) -> Iterator[FileChunk]:
    """A text file in chunks that end at line ends, those at characters' ends where a line is too long."""
    lines = Lines(opened, offset)
    held: list[str] = []
    chars = 0
    while raw := lines.take(4 * CHUNK_CHARS + 2):  # that many characters, and whatever shows where the last one ends
        start = lines.offset - len(raw)
        text, used = _decoded(raw)
        lines.unread(len(raw) - used)
        if held and chars + len(text) > CHUNK_CHARS:
            yield FileChunk("".join(held), False, start, start)
            held, chars = [], 0
        held.append(text)
        chars += len(text)
    if held:
        yield FileChunk("".join(held), True, lines.offset, lines.offset)


def _decoded(raw: bytes) -> tuple[str, int]:
    """A line, or as much of it as a chunk may have, with the number of bytes it has there."""
    ended = raw.endswith((b"\n", b"\r"))
    text = raw.decode("utf-8", _MARKED)
    if ended:
        text = text.rstrip("\r\n") + "\n"
    if len(text) <= CHUNK_CHARS:
        return text.translate(_MARKS), len(raw)
    text = text[:CHUNK_CHARS]
    marks = [ord(char) for char in text if ord(char) in _MARKS]
    return text.translate(_MARKS), len(text.encode("utf-8", "ignore")) + sum(marks) - len(marks) * _MARK


# Bytes that are not UTF-8 become one U+FFFD for each run that Python's "replace" would replace. To know how many bytes
# that were, each is a lone surrogate at first, which UTF-8 cannot hold, with their number in it.
_MARKED, _MARK = "jaxllm-marked", 0xDC00
_MARKS = {_MARK + count: "\ufffd" for count in range(1, 4)}


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return chr(_MARK + error.end - error.start), error.end


codecs.register_error(_MARKED, _mark)


def _json_rows(opened: BinaryIO, offset: int, field: str) -> Iterator[FileChunk]:
    lines = Lines(opened, offset)
    while raw := lines.take(MAX_ROW_BYTES):
        if len(raw) == MAX_ROW_BYTES and not _ended(raw):
            while not _ended(lines.take(BLOCK) or b"\n"):
                pass
            yield FileChunk(None, True, lines.offset, lines.offset)
        elif (line := raw.decode("utf-8", "replace")).strip():
            yield FileChunk(_text_of(line, field), True, lines.offset, lines.offset)


def _ended(raw: bytes) -> bool:
    return raw.endswith((b"\n", b"\r"))


def _text_of(line: str, field: str) -> str | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return text_in(row.get(field)) if isinstance(row, dict) else None


def valid_unicode(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes: they become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def text_in(value: object) -> str | None:
    """A row's text; None where the field holds something else or nothing."""
    return valid_unicode(value) if isinstance(value, str) and value else None


def _parquet_rows(opened: BinaryIO, file: Path, size: int, offset: int, field: str) -> Iterator[FileChunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(opened)
        names = parquet.schema_arrow.names
        if field not in names:
            raise UserError(f"data: {file} has no field {field!r}: pass --text-field, one of {listed(names)}")
        groups = range(parquet.metadata.num_row_groups)
        rows = [parquet.metadata.row_group(group).num_rows for group in groups]
        first = row = 0  # the row group with the offset in it, and its first row
        while first < len(rows) and row + rows[first] <= offset:
            row += rows[first]
            first += 1
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups[first:], columns=[field]):
            for value in batch.column(0):  # one by one: a dictionary's long text may stand in every row
                row += 1
                if row > offset:
                    yield FileChunk(text_in(value.as_py()), True, row, size * row // parquet.metadata.num_rows)
    except UnicodeDecodeError:
        raise UserError(
            f"data: the field {field!r} of {file} holds bytes that are not UTF-8: write the file again, or leave it out"
        ) from None
    except pyarrow.ArrowException as error:
        raise UserError(f"data: {file} is no parquet file: {one_line(error)}") from None
