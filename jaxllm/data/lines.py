"""One file's bytes as lines of UTF-8: kinds of files, compression, encodings."""

import codecs
import contextlib
import csv
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from jaxllm.errors import one_line

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

MAX_ROW_BYTES = 64 << 20
"""A longer line of a JSONL file is skipped: it may not fit in memory."""

BLOCK = 1 << 16
"""Bytes that are read at once."""

_LINE_END = re.compile(rb"\r\n?|\n")


class Unreadable(Exception):
    """A file cannot be read, or not to its end. The message is the reason, without the file's name."""


class NoText(Unreadable):
    """No row of a file has a text."""


def kind_of(file: PurePath) -> str | None:
    """What a file's name says it holds, a value of `SUFFIXES`; None: nothing that is read."""
    name = PurePath(file.name.lower())
    if name.suffix not in COMPRESSIONS:
        return SUFFIXES.get(name.suffix)
    kind = SUFFIXES.get(PurePath(name.stem).suffix)
    return None if kind in ("parquet", "arrow") else kind


def ending_of(file: PurePath) -> str:
    """The ending by which a file's kind is known, with that of its compression."""
    name = PurePath(file.name.lower())
    return PurePath(name.stem).suffix + name.suffix if name.suffix in COMPRESSIONS else name.suffix


@contextlib.contextmanager
def errors_as_unreadable() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except PermissionError:
        raise
    except (OSError, EOFError, lzma.LZMAError, csv.Error, ValueError, RecursionError, pyarrow.ArrowException) as error:
        raise Unreadable(one_line(error)) from None


def check_encoding(head: bytes) -> None:
    """Raise `Unreadable` if a file does not start with UTF-8 text; single wrong bytes are replaced later."""
    if head.startswith(b"version https://git-lfs"):
        raise Unreadable("it is a pointer of Git LFS, not the data: run `git lfs pull`")
    if head.count(0) > len(head) // 100:
        raise Unreadable("it holds zero bytes: if it is UTF-16 without a byte-order mark, write it as UTF-8")
    text = head.decode("utf-8", "replace")
    wrong = text.count("\ufffd") - head.count("\ufffd".encode())
    others = len(text) - len(text.encode("ascii", "ignore")) - wrong
    if wrong > max(len(text) // 100, others):
        raise Unreadable("it is not UTF-8: write it as UTF-8, e.g. with `iconv -f LATIN1 -t UTF-8`")


def head_of(file: Path, size: int = BLOCK) -> bytes:
    """The first bytes of a file, as UTF-8, without a mark."""
    with file.open("rb") as raw:
        return as_utf8(file, raw)[0].read(size).removeprefix(codecs.BOM_UTF8)


def as_utf8(file: Path, raw: BinaryIO) -> tuple[BinaryIO, int]:
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


def _decompressed(file: Path, raw: BinaryIO) -> BinaryIO:
    import pyarrow

    codec = COMPRESSIONS.get(file.suffix.lower())
    if codec is None:
        return raw
    return lzma.open(raw) if codec == "xz" else pyarrow.CompressedInputStream(raw, codec)  # pyright: ignore[reportReturnType]


def lines_of(file: Path, raw: BinaryIO, offset: int) -> tuple["Lines", Callable[[int], int]]:
    """The lines of a file from an offset on, and how many bytes of the file an offset stands for."""
    stream, mark = as_utf8(file, raw)
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


def skip_long_line(lines: Lines, raw: bytes, most: int, block: int = BLOCK) -> str:
    """Skip the rest of a line of which `raw` is only the first `most` bytes; returns what is wrong with it, if so."""
    if len(raw) < most or raw.endswith((b"\n", b"\r")):
        return ""
    while (rest := lines.take(block)) and not rest.endswith((b"\n", b"\r")):
        pass
    return f"a line of more than {most} bytes"
