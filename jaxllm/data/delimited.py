"""Rows of CSV and TSV files. Damage is reported, not repaired: no row is made of what a parser would have to guess.

TSV has no quoting: a row is a line, unless a CSV writer made the file, or a quoted field makes one row of several lines
that are not rows themselves. In CSV a quoted field may span lines, so one stray quote can swallow the rows after it.
Where it never closes, or closes within a field, that row is dropped alone, and reading continues with the lines in it
if they are rows themselves. A field that closes is a text, or makes its row too long: its lines are never rows.
"""

import contextlib
import csv
import io
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxllm.data.lines import MAX_ROW_BYTES, Lines, skip_long_line

MAX_ROW_LINES = 200
"""A row of more lines is damaged."""

ROW_LIKE = 0.9
"""Share of the lines in a damaged row which must be rows themselves, so that they are read as such."""


class Record(NamedTuple):
    values: list[str]  # empty if it is damaged
    offset: int  # where the next one starts
    damage: str = ""


class _TooLong(Exception):
    pass


class _Ahead:
    """Lines that can be given back."""

    def __init__(self, lines: Lines):
        self._lines = lines
        self._ahead: deque[bytes] = deque()
        self._bytes = 0

    @property
    def offset(self) -> int:
        return self._lines.offset - self._bytes

    def take(self) -> bytes:
        if not self._ahead:
            return self._lines.take(MAX_ROW_BYTES)
        line = self._ahead.popleft()
        self._bytes -= len(line)
        return line

    def give_back(self, taken: list[bytes]) -> None:
        self._ahead.extendleft(reversed(taken))
        self._bytes += sum(map(len, taken))

    def skip_long(self, raw: bytes) -> str:
        return "" if self._ahead else skip_long_line(self._lines, raw, MAX_ROW_BYTES)


def tsv_records(lines: Lines, fields: int) -> Iterator[Record]:
    """Rows of `fields` fields each, one a line."""
    ahead = _Ahead(lines)
    while raw := ahead.take():
        if long := ahead.skip_long(raw):
            yield Record([], ahead.offset, long)
        elif line := _text(raw).rstrip("\r\n"):
            values, damage = _over_lines(ahead, raw, fields) if '\t"' in f"\t{line}" else ([], "")
            record = _checked(values or line.split("\t"), fields, ahead.offset)
            yield Record([], ahead.offset, damage) if damage else record


def _over_lines(ahead: _Ahead, first: bytes, fields: int) -> tuple[list[str], str]:
    """The row that a quoted field makes of several lines, or what is wrong with it: at least half of them are not rows.

    Nothing is taken where the first line is a row by itself. In a file of one column all lines are rows, so one over
    several is damage.
    """
    ahead.give_back([first])
    taken: list[bytes] = []
    values, damage = _parsed(ahead, taken, "\t", MAX_ROW_LINES)
    over_lines = 2 * sum(line.count(b"\t") + 1 != fields for line in taken) >= len(taken) > 1
    if not damage and len(taken) > 1 and len(values) == fields == 1:
        return [], "a quote that closes in a later line, which may be one text or several"
    if over_lines and not damage and len(values) == fields:
        return values, ""
    ahead.give_back(taken[1:])
    return [], "a quoted field over several lines that does not end well" if over_lines else ""


def csv_records(lines: Lines, fields: int, delimiter: str) -> Iterator[Record]:
    """Rows of `fields` fields each."""
    csv.field_size_limit(MAX_ROW_BYTES)
    ahead = _Ahead(lines)
    while True:
        taken: list[bytes] = []
        values, damage = _parsed(ahead, taken, delimiter)
        if not taken:
            return
        inner = taken[1:]
        if damage and sum(_is_row(line, fields, delimiter) for line in inner) > ROW_LIKE * len(inner):
            ahead.give_back(inner)
        elif damage == _LONG_ROW:
            _skip_to_quote(ahead)
        elif len(taken) > MAX_ROW_LINES:
            damage = damage or f"a field of more than {MAX_ROW_LINES} lines"
        if damage:
            yield Record([], ahead.offset, damage)
        elif values:
            yield _checked(values, fields, ahead.offset)


_LONG_ROW = f"a row of more than {MAX_ROW_BYTES} bytes"


def _parsed(ahead: _Ahead, taken: list[bytes], delimiter: str, most_lines: int | None = None) -> tuple[list[str], str]:
    """The values of the next row, or what is wrong with it. `taken`: the lines of which it is made are added."""
    ended, long, size = False, "", 0

    def feed() -> Iterator[str]:
        nonlocal ended, long, size
        while raw := ahead.take():
            taken.append(raw)
            long = ahead.skip_long(raw)
            size += len(raw)
            if not long and (size > MAX_ROW_BYTES or len(taken) == most_lines):
                long = _LONG_ROW
            if long:
                raise _TooLong
            yield _text(raw)
        ended = True

    try:
        return next(csv.reader(feed(), delimiter=delimiter, strict=True), []), ""
    except csv.Error:
        return [], "an unclosed quote" if ended else "a stray quote"
    except _TooLong:
        return [], long


def _skip_to_quote(ahead: _Ahead) -> None:
    """Skip the rest of a quoted field, which ends with a line that has an odd number of quotes."""
    while raw := ahead.take():
        if raw.count(b'"') % 2:
            return


def written_as_csv(head: str) -> bool:
    """Whether the start of a TSV file was written by a CSV writer: quotes in its fields are doubled, as that does.

    A writer makes the same text of the rows that a CSV reader finds in it.
    """
    head = head.replace("\r\n", "\n")
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # the last row may be cut
        rows.extend(csv.reader(io.StringIO(head, newline=""), delimiter="\t", strict=True))
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        out = io.StringIO(newline="")
        csv.writer(out, delimiter="\t", lineterminator="\n", quoting=quoting).writerows(rows[:-1])
        if '""' in out.getvalue() and head.startswith(out.getvalue()):
            return True
    return False


def _checked(values: Sequence[str], fields: int, offset: int) -> Record:
    if len(values) < fields or any(values[fields:]):
        return Record([], offset, f"another number of fields than the header's {fields}")
    return Record(list(values[:fields]), offset)


def _is_row(line: bytes, fields: int, delimiter: str) -> bool:
    """Whether a line is a whole row by itself."""
    try:
        return len(next(csv.reader([_text(line)], delimiter=delimiter, strict=True), [])) == fields
    except csv.Error:
        return False


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
