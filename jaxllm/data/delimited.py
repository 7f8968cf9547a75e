"""Rows of CSV and TSV files. Damage is reported, not repaired: no row is made of what a parser would have to guess.

TSV has no quoting: a row is a line, unless a CSV writer made the file. In CSV a quoted field may span lines, so one
stray quote can swallow the rows after it. Such a row is dropped alone where the lines in it are rows themselves, and
reading continues with them.
"""

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxllm.data.lines import MAX_ROW_BYTES, Lines, skip_long_line

MAX_ROW_LINES = 200
"""A CSV row of more lines is damaged."""

ROW_LIKE = 0.9
"""Share of the lines in a damaged row which must be rows themselves, so that they are read as such."""

SWALLOWED_DELIMITERS = 6
"""A row that closes its quotes has swallowed others if all lines in it are rows, with so many delimiters together."""


class Record(NamedTuple):
    values: list[str]  # empty if it is damaged
    offset: int  # where the next one starts
    damage: str = ""


class _TooLong(Exception):
    pass


def tsv_records(lines: Lines, fields: int) -> Iterator[Record]:
    """Rows of `fields` fields each, one a line."""
    while raw := lines.take(MAX_ROW_BYTES):
        if long := skip_long_line(lines, raw, MAX_ROW_BYTES):
            yield Record([], lines.offset, long)
        elif line := _text(raw).rstrip("\r\n"):
            yield _checked(line.split("\t"), fields, lines.offset)


def csv_records(lines: Lines, fields: int, delimiter: str) -> Iterator[Record]:
    """Rows of `fields` fields each."""
    csv.field_size_limit(MAX_ROW_BYTES)
    ahead: list[bytes] = []  # lines that a damaged row had swallowed
    while True:
        taken: list[bytes] = []
        values, damage = _parsed(lines, ahead, taken, fields, delimiter)
        if not taken:
            return
        inner = taken[1:] if damage else taken[1:-1]
        row_like = [_is_row(line, fields, delimiter) for line in inner]
        if damage:
            give_back = sum(row_like) > ROW_LIKE * len(inner)
        else:
            give_back = all(row_like) and (fields - 1) * len(inner) >= SWALLOWED_DELIMITERS
        if give_back:
            ahead[:0] = taken[1:]
            values, damage = [], damage or "a stray quote"
        offset = lines.offset - sum(map(len, ahead))
        if damage:
            yield Record([], offset, damage)
        elif values:
            yield _checked(values, fields, offset)


def _parsed(lines: Lines, ahead: list[bytes], taken: list[bytes], fields: int, delimiter: str) -> tuple[list[str], str]:
    """The values of the next row, or what is wrong with it. `taken`: the lines of which it is made are added."""
    ended = False

    def feed() -> Iterator[str]:
        nonlocal ended
        while raw := ahead.pop(0) if ahead else lines.take(MAX_ROW_BYTES):
            taken.append(raw)
            if skip_long_line(lines, raw, MAX_ROW_BYTES) or len(taken) > MAX_ROW_LINES:
                raise _TooLong
            yield _text(raw)
        ended = True

    try:
        return next(csv.reader(feed(), delimiter=delimiter, strict=True), []), ""
    except csv.Error:
        return [], "an unclosed quote" if ended else "a stray quote"
    except _TooLong:
        pass
    if len(taken) <= MAX_ROW_LINES:
        return [], f"a line of more than {MAX_ROW_BYTES} bytes"
    inner = taken[1:]
    if sum(_is_row(line, fields, delimiter) for line in inner) <= ROW_LIKE * len(inner):
        _skip_to_quote(lines, ahead)
    return [], f"a field of more than {MAX_ROW_LINES} lines"


def _skip_to_quote(lines: Lines, ahead: list[bytes]) -> None:
    """Skip the rest of a quoted field, which ends with a line that has an odd number of quotes."""
    while raw := ahead.pop(0) if ahead else lines.take(MAX_ROW_BYTES):
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
