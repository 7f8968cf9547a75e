"""Reading one file of text or rows from any offset, so that a resumed run reads nothing twice.

An offset is a byte of the UTF-8 text (of text, JSON lines and CSV), or a row (of a JSON array, parquet and Arrow).
"""

import codecs
import contextlib
import csv
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxllm.errors import listed, one_line

SUFFIXES = {
    ".txt": "text", ".md": "text", ".py": "text", ".text": "text", ".jsonl": "lines", ".ndjson": "lines",
    ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
"""Of all kinds of files but parquet and Arrow, which compress on their own."""

MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Byte-order marks. That of UTF-32 LE begins with that of UTF-16 LE, so it is tried first."""

CHAT = "messages"
"""Field of a chat: a list of messages, each with a `role`. It is read where there is no field `text`."""

CHUNK_CHARS = 4096
"""Largest chunk of a text file, so that a file of any size can be read."""

MAX_ROW_BYTES = 64 << 20
"""A longer line of a JSONL file is skipped: it is no document, and may not fit in memory."""

MAX_ARRAY_BYTES = 2 << 30
"""A longer JSON array is refused: it is read at once."""

BLOCK = 1 << 16
"""Bytes that are read at once."""

LOOK_BYTES = 1 << 20
"""Bytes of a file that `look` reads in search of a text."""

BATCH_ROWS = 1024
"""Rows of a parquet file that are decoded at once."""

_LINE_END = re.compile(rb"\r\n?|\n")


Chat = list[dict[str, Any]]


class Unreadable(Exception):
    """A file cannot be read, or not to its end. The message is the reason, without the file's name."""


class NoText(Unreadable):
    """No row of a file has a text."""


class FileChunk(NamedTuple):
    """A chunk of a text file, or a row."""

    text: str | Chat | None  # None: a row without text
    ends_document: bool
    offset: int  # where the next one starts
    done: int  # bytes of the file up to there; of a parquet file, its share of the rows


class _Row(NamedTuple):
    values: dict[str, Any] | None  # by field; None: no row could be made of these bytes
    offset: int
    done: int


def kind_of(file: Path) -> str | None:
    """What a file's name says it holds, a value of `SUFFIXES`; None: nothing that is read."""
    name = Path(file.name.lower())
    if name.suffix not in COMPRESSIONS:
        return SUFFIXES.get(name.suffix)
    kind = SUFFIXES.get(Path(name.stem).suffix)
    return None if kind in ("parquet", "arrow") else kind


def read_chunks(file: Path, size: int, offset: int, text_field: str) -> Iterator[FileChunk]:
    """The chunks of a file from an offset on.

    Raises:
        Unreadable: it cannot be read, or has no such field.
        NoText: it was read from the start, and no row has a text.
    """
    with _errors_as_unreadable(), file.open("rb") as raw:
        if kind_of(file) == "text":
            yield from _chunks(*_lines(file, raw, offset))
            return
        found = offset > 0
        for row in _rows(file, raw, size, offset, text_field):
            text = text_in(value_of(row.values, text_field))
            found = found or text is not None
            yield FileChunk(text, True, row.offset, row.done)
    if not found:
        raise NoText(_without_text(text_field, ()))


def look(file: Path, size: int, text_field: str) -> None:
    """Check a file without reading much of it: its encoding and first rows, or a parquet file's footer.

    Raises:
        Unreadable: it cannot be read.
        NoText: it is empty, or holds no text.
    """
    if size == 0:
        raise NoText("it is empty")
    with _errors_as_unreadable(), file.open("rb") as raw:
        kind = kind_of(file)
        if kind == "parquet":
            _look_at_footer(raw, text_field)
            return
        if kind != "arrow":
            _check_encoding(_head(file))
        if kind == "text":
            return
        fields: dict[str, None] = {}
        for row in _rows(file, raw, size, 0, text_field):
            if text_in(value_of(row.values, text_field)) is not None:
                return
            fields |= dict.fromkeys(row.values or ())
            if row.done > LOOK_BYTES:
                if any(name.partition(".")[0] in fields for name in wanted_fields(text_field)):
                    return  # later rows may have a text
                break
        raise NoText(_without_text(text_field, fields))


@contextlib.contextmanager
def _errors_as_unreadable() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except PermissionError:
        raise
    except (OSError, EOFError, lzma.LZMAError, csv.Error, ValueError, RecursionError, pyarrow.ArrowException) as error:
        raise Unreadable(one_line(error)) from None


def _check_encoding(head: bytes) -> None:
    """Refuse the first bytes of a file that is no UTF-8 text; single wrong bytes are replaced later."""
    if head.startswith(b"version https://git-lfs"):
        raise Unreadable("it is a pointer of Git LFS, not the data: run `git lfs pull`")
    if head.count(0) > len(head) // 100:
        raise Unreadable("it holds zero bytes: if it is UTF-16 without a byte-order mark, write it as UTF-8")
    text = head.decode("utf-8", "replace")
    wrong = text.count("\ufffd") - head.count("\ufffd".encode())
    if wrong > max(len(text) // 100, sum(not char.isascii() for char in text) - wrong):
        raise Unreadable("it is not UTF-8: write it as UTF-8, e.g. with `iconv -f LATIN1 -t UTF-8`")


def _utf8(file: Path, raw: BinaryIO) -> tuple[BinaryIO, int]:
    """A file's content as UTF-8, decompressed, and the number of bytes of a mark at its start."""
    with file.open("rb") as first:  # pyarrow's stream closes its file at its own end
        head = _decompressed(file, first).read(4)
    stream = _decompressed(file, raw)
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            if encoding == "utf-8":
                return stream, len(mark)
            return codecs.EncodedFile(stream, "utf-8", encoding, "replace"), 0  # pyright: ignore[reportReturnType]
    return stream, 0


def _head(file: Path) -> bytes:
    """The first bytes of a file, as UTF-8, without a mark."""
    with file.open("rb") as raw:
        return _utf8(file, raw)[0].read(BLOCK).removeprefix(codecs.BOM_UTF8)


def _decompressed(file: Path, raw: BinaryIO) -> BinaryIO:
    import pyarrow

    codec = COMPRESSIONS.get(file.suffix.lower())
    if codec is None:
        return raw
    return lzma.open(raw) if codec == "xz" else pyarrow.CompressedInputStream(raw, codec)  # pyright: ignore[reportReturnType]


def _lines(file: Path, raw: BinaryIO, offset: int) -> tuple["Lines", Callable[[int], int]]:
    """The lines of a file from an offset on, and how many bytes of the file an offset stands for."""
    stream, mark = _utf8(file, raw)
    lines = Lines(stream, seekable=stream is raw)
    lines.skip_to(max(offset, mark))
    return lines, lambda offset: offset if stream is raw else raw.tell()


class Lines:
    """Lines of a file. They end as in Python's text mode: at \\n, \\r or \\r\\n."""

    def __init__(self, opened: BinaryIO, seekable: bool = True):
        self.offset = 0  # of the next line
        self._opened, self._seekable = opened, seekable
        self._buffer, self._start = b"", 0  # what is read and not taken begins at `start`

    def skip_to(self, offset: int) -> None:
        """Continue at a later offset. What cannot be sought in is read up to there."""
        if self._seekable:
            self._opened.seek(offset)
            self._buffer, self._start, self.offset = b"", 0, offset
        while self.offset < offset and self.take(offset - self.offset):
            pass

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


def _chunks(lines: Lines, done: Callable[[int], int]) -> Iterator[FileChunk]:
    """A text file in chunks that end at line ends, those at characters' ends where a line is too long."""
    held: list[str] = []
    chars = 0
    while raw := lines.take(4 * CHUNK_CHARS + 2):  # that many characters, and whatever shows where the last one ends
        start = lines.offset - len(raw)
        text, used = _decoded(raw)
        lines.unread(len(raw) - used)
        if held and chars + len(text) > CHUNK_CHARS:
            yield FileChunk("".join(held), False, start, done(start))
            held, chars = [], 0
        held.append(text)
        chars += len(text)
    if held:
        yield FileChunk("".join(held), True, lines.offset, done(lines.offset))


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


def _rows(file: Path, raw: BinaryIO, size: int, offset: int, text_field: str) -> Iterator[_Row]:
    """The rows of a file from an offset on, with all their fields or only the one that is asked for."""
    kind = kind_of(file)
    if kind == "parquet":
        return _parquet_rows(raw, size, offset, text_field)
    if kind == "arrow":
        return _arrow_rows(raw, offset, text_field)
    if kind == "csv":
        return _csv_rows(*_lines(file, raw, 0), offset, text_field, "\t,;|" if ".tsv" in file.name.lower() else ",;\t|")
    if kind == "json" and _head(file).lstrip().startswith(b"["):
        return _array_rows(_utf8(file, raw)[0], size, offset)
    return _line_rows(*_lines(file, raw, offset))


def _line_rows(lines: Lines, done: Callable[[int], int]) -> Iterator[_Row]:
    """JSON lines."""
    while raw := lines.take(MAX_ROW_BYTES):
        if len(raw) == MAX_ROW_BYTES and not _ended(raw):
            while not _ended(lines.take(BLOCK) or b"\n"):
                pass
            yield _Row(None, lines.offset, done(lines.offset))
        elif (line := raw.decode("utf-8", "replace")).strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield _Row(row if isinstance(row, dict) else None, lines.offset, done(lines.offset))


def _ended(raw: bytes) -> bool:
    return raw.endswith((b"\n", b"\r"))


def _array_rows(stream: BinaryIO, size: int, offset: int) -> Iterator[_Row]:
    """A JSON array, which is read at once."""
    content = stream.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        raise Unreadable(f"it is a JSON array of more than {MAX_ARRAY_BYTES >> 30} GiB: write it as JSONL")
    rows = json.loads(content.decode("utf-8-sig", "replace"))
    for number, row in enumerate(rows[offset:], start=offset + 1):
        yield _Row(row if isinstance(row, dict) else None, number, size * number // len(rows))


def _csv_rows(
    lines: Lines, done: Callable[[int], int], offset: int, text_field: str, delimiters: str
) -> Iterator[_Row]:
    """CSV with a header; its delimiter is the first of some with which the header has the field."""
    csv.field_size_limit(MAX_ROW_BYTES)
    first = lines.take(MAX_ROW_BYTES).decode("utf-8", "replace")
    headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in delimiters}
    delimiter = next((d for d in headers if not set(wanted_fields(text_field)).isdisjoint(headers[d])), delimiters[0])
    header = headers[delimiter]
    if set(wanted_fields(text_field)).isdisjoint(header):
        raise NoText(_without_text(text_field, header))
    lines.skip_to(max(offset, lines.offset))
    texts = (raw.decode("utf-8", "replace") for raw in iter(lambda: lines.take(MAX_ROW_BYTES), b""))
    for values in csv.reader(texts, delimiter=delimiter):
        if values:
            yield _Row(dict(zip(header, values, strict=False)), lines.offset, done(lines.offset))


def _parquet_rows(raw: BinaryIO, size: int, offset: int, text_field: str) -> Iterator[_Row]:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(raw)
    column = _column(parquet.schema_arrow, text_field)
    groups = range(parquet.metadata.num_row_groups)
    rows = [parquet.metadata.row_group(group).num_rows for group in groups]
    first = row = 0  # the row group with the offset in it, and its first row
    while first < len(rows) and row + rows[first] <= offset:
        row += rows[first]
        first += 1
    batches = (  # a group at a time, so that those before a damaged one are read
        batch for group in groups[first:] for batch in parquet.iter_batches(BATCH_ROWS, [group], columns=[column])
    )
    for batch in batches:
        for value in batch.column(0):  # one by one: a dictionary's long text may stand in every row
            row += 1
            if row > offset:
                values = {batch.schema.names[0]: _python_value(value)}
                yield _Row(values, row, size * row // parquet.metadata.num_rows)


def _arrow_rows(raw: BinaryIO, offset: int, text_field: str) -> Iterator[_Row]:
    """An Arrow file or stream; `datasets` writes streams."""
    import pyarrow.ipc

    magic = raw.read(6)
    raw.seek(0)
    if magic == b"ARROW1":
        file = pyarrow.ipc.open_file(raw)
        schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(raw)
        schema = batches.schema
    name, row = _column(schema, text_field), 0
    name = name if name in schema.names else name.partition(".")[0]
    for batch in batches:
        for value in batch.column(name) if row + batch.num_rows > offset else ():
            row += 1
            if row > offset:
                yield _Row({name: _python_value(value)}, row, raw.tell())
        row = max(row, min(offset, row + batch.num_rows))


def _look_at_footer(raw: BinaryIO, text_field: str) -> None:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(raw)
    column, metadata = _column(parquet.schema_arrow, text_field), parquet.metadata
    if metadata.num_rows == 0:
        raise NoText("it has no rows")
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        facts = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column]
        nulls = [fact.statistics.null_count for fact in facts if fact.statistics and fact.statistics.has_null_count]
        if nulls != [group.num_rows]:
            return
    raise NoText(_without_text(text_field, ()))


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:  # nothing in a parquet file says that a string's bytes are UTF-8
        return value.as_buffer().to_pybytes() if hasattr(value, "as_buffer") else None


def _column(schema: Any, text_field: str) -> str:
    """The column with the text or the chat."""
    names = list(_names(schema))
    for name in wanted_fields(text_field):
        if name in names:
            return name
    raise NoText(_without_text(text_field, names))


def _names(fields: Any, outer: str = "") -> Iterator[str]:
    """Names of a schema's columns; those in a column `a` are named `a.b`."""
    import pyarrow

    for field in fields:
        yield outer + field.name
        if pyarrow.types.is_struct(field.type):
            yield from _names(field.type, f"{outer}{field.name}.")


def wanted_fields(text_field: str) -> tuple[str, ...]:
    """The fields that may hold a text, the first one that does."""
    return (text_field, CHAT) if text_field == "text" else (text_field,)


def _without_text(text_field: str, fields: Iterable[str]) -> str:
    fields = list(fields)
    if not fields or text_field in fields:
        return f"no row has a text in the field {text_field!r}"
    return f"there is no field {text_field!r}, but {listed(fields)}: pass --text-field"


def value_of(row: dict[str, Any] | None, text_field: str) -> Any:
    """A row's field. `a.b` is the field `b` of the field `a`, where there is no field of this name."""
    for name in wanted_fields(text_field) if row else ():
        value: Any = row
        for part in [name] if name in value else name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def valid_unicode(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes: they become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def text_in(value: object) -> str | Chat | None:
    """A row's text or chat; None where the field holds something else or nothing."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list) and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in value):
        return value or None
    return valid_unicode(value) if isinstance(value, str) and value else None
