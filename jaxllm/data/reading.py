"""Reading one file of text or rows from any offset, so that a resumed run reads nothing twice.

An offset is a byte of the UTF-8 text (of text, JSON lines and CSV), or a row (of a JSON array, parquet and Arrow).
"""

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.data.chats import CHAT_FIELDS, OtherPart, Text, forms, is_chat, other_side, text_in, without_text
from jaxllm.data.lines import (
    Lines,
    NoText,
    Unreadable,
    check_encoding,
    errors_as_unreadable,
    head_of,
    kind_of,
    lines_of,
)
from jaxllm.data.rows import Row, arrow_batches, look_at_footer, names_in, read_rows
from jaxllm.errors import listed

CHUNK_CHARS = 4096
"""Largest chunk of a text file, so that a file of any size can be read."""

PANDAS = ', as pandas does with to_json(FILE, orient="records", lines=True)'
"""How to write rows where a file has the columns of a table."""

LOOK_BYTES = 1 << 20
"""Bytes of a file that `look` reads in search of a text."""


class FileChunk(NamedTuple):
    """A chunk of a text file, or a row."""

    text: Text | None  # None: a row without text
    ends_document: bool
    offset: int  # where the next one starts
    done: int  # bytes of the file up to there; of a parquet file, its share of the rows
    damage: str = ""  # of a row without text, what is wrong with it, if that is known
    other_part: bool = False  # whether that is a part of a message that is not text


def read_chunks(file: Path, size: int, offset: int, text_field: str, strict: bool = True) -> Iterator[FileChunk]:
    """The chunks of a file from an offset on. `strict`: damaged rows are not repaired, as earlier versions did.

    Raises:
        Unreadable: it cannot be read, or has no such field.
        NoText: it was read from the start, and no row has a text.
    """
    with errors_as_unreadable(), file.open("rb") as raw:
        if kind_of(file) == "text":
            yield from _text_chunks(*lines_of(file, raw, offset))
            return
        found = offset > 0
        for row in read_rows(file, raw, size, offset, text_field, strict):
            try:
                chunk = FileChunk(text_in(row.values, text_field, strict), True, row.offset, row.done, row.damage)
            except OtherPart as other:
                chunk = FileChunk(None, True, row.offset, row.done, str(other), other_part=True)
            found = found or chunk.text is not None
            yield chunk
    if not found:
        raise NoText(without_text(text_field, ()))


def rows_in(file: Path) -> int | None:
    """How many rows a parquet file has; None where it would have to be read."""
    if kind_of(file) != "parquet":
        return None
    import pyarrow.parquet

    try:
        with errors_as_unreadable():
            return pyarrow.parquet.read_metadata(file).num_rows
    except (Unreadable, PermissionError):
        return None


def look(file: Path, size: int, text_field: str, strict: bool = True) -> tuple[str, ...]:
    """Check a file without reading much of it: its encoding and first rows, or a parquet file's footer.

    Returns the fields of its first row, if those in `text_field` are questions and it has answers, or the reverse.

    `strict`: as of `read_chunks`.

    Raises:
        Unreadable: it cannot be read.
        NoText: it is empty, or holds no text.
    """
    if size == 0:
        raise NoText("it is empty")
    with errors_as_unreadable(), file.open("rb") as raw:
        kind = kind_of(file)
        if kind == "parquet":
            return other_side(text_field, look_at_footer(raw, text_field, strict))
        if kind != "arrow":
            check_encoding(head_of(file))
        if kind == "text":
            return ()
        names = arrow_batches(raw)[0].names if kind == "arrow" else None
        raw.seek(0)
        fields: dict[str, None] = {}
        rows, row = 0, None
        for row in read_rows(file, raw, size, 0, text_field, strict):
            rows += 1
            if _has_text(row, text_field, strict):
                return other_side(text_field, names or row.values or ())
            fields |= dict.fromkeys(names_in(row.values))
            if row.done > LOOK_BYTES:
                if any({*form} <= {*fields} for form in forms(text_field, strict)):
                    return ()  # later rows may have a text
                break
        if rows == 1 and row is not None and (found := _whole_file_in(row.values or {}, text_field)):
            raise NoText(f"it is one JSON object, {found}: write each row as a line, in JSONL{PANDAS}")
        raise NoText(f"it has {row.damage}" if row and row.damage and not fields else without_text(text_field, fields))


def _has_text(row: Row, text_field: str, strict: bool) -> bool:
    try:
        return text_in(row.values, text_field, strict) is not None
    except OtherPart:
        return False


def _whole_file_in(row: dict[str, Any], text_field: str) -> str:
    """Where a single object holds the rows of the file; empty if it does not."""
    if row and all(name.isdecimal() and isinstance(value, dict) for name, value in row.items()):
        return f"whose fields {listed(list(row)[:2])} and so on are rows, {len(row)} in all"
    for name, value in row.items():
        if isinstance(value, dict) and value and all(key.isdecimal() for key in value):
            return f"whose field {name!r} is a column of {len(value)} rows"
        if name in CHAT_FIELDS or is_chat(value):
            continue
        kinds = {type(one) for one in value} if isinstance(value, list) else set()
        if kinds == {str} and name == text_field:
            return f"whose field {name!r} is a column of {len(value)} texts"
        if kinds == {dict}:
            return f"whose field {name!r} holds {len(value)} rows"
    return ""


def _text_chunks(lines: Lines, done: Callable[[int], int]) -> Iterator[FileChunk]:
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
