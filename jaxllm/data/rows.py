"""Rows of JSON, CSV, parquet and Arrow files."""

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxllm.data.chats import form_in, without_text
from jaxllm.data.delimited import csv_records, tsv_records, written_as_csv
from jaxllm.data.json_rows import Decoder, document_rows, form_of
from jaxllm.data.lines import (
    BLOCK,
    MAX_ROW_BYTES,
    Lines,
    NoText,
    Unreadable,
    as_utf8,
    head_of,
    kind_of,
    lines_of,
    skip_long_line,
)

BATCH_ROWS = 1024
"""Rows of a parquet file that are decoded at once."""

ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The end of an Arrow stream; its last half in streams of before Arrow 0.15."""


class Row(NamedTuple):
    values: dict[str, Any] | None  # by field; None: no row could be made of these bytes
    offset: int
    done: int
    damage: str = ""  # why no row could be made, if that is known


def read_rows(file: Path, raw: BinaryIO, size: int, offset: int, text_field: str, strict: bool = True) -> Iterator[Row]:
    """The rows of a file from an offset on, with all their fields or only the one that is asked for.

    `strict`: damaged rows of CSV and TSV are not repaired, as earlier versions did.
    """
    kind = kind_of(file)
    if kind == "parquet":
        return _parquet_rows(raw, size, offset, text_field, strict)
    if kind == "arrow":
        return _arrow_rows(raw, offset, text_field, strict)
    if kind == "csv":
        return _delimited_rows(file, *lines_of(file, raw, 0), offset, text_field, strict)
    form = form_of(file)
    if form != "lines":
        return _document_rows(document_rows(as_utf8(file, raw)[0], form), size, offset)
    return _line_rows(*lines_of(file, raw, offset))


def _line_rows(lines: Lines, done: Callable[[int], int]) -> Iterator[Row]:
    """JSON lines."""
    decoder = Decoder()
    while raw := lines.take(MAX_ROW_BYTES):
        if long := skip_long_line(lines, raw, MAX_ROW_BYTES, BLOCK):
            yield Row(None, lines.offset, done(lines.offset), long)
        elif (line := raw.decode("utf-8", "replace")).strip():
            yield _json_row(decoder.line(line), lines.offset, done(lines.offset))


def _document_rows(rows: list[dict[str, Any] | str], size: int, offset: int) -> Iterator[Row]:
    """A JSON file that was read at once."""
    for number, row in enumerate(rows[offset:], start=offset + 1):
        yield _json_row(row, number, size * number // len(rows))


def _json_row(row: dict[str, Any] | str, offset: int, done: int) -> Row:
    return Row(None, offset, done, row) if isinstance(row, str) else Row(row, offset, done)


def _delimited_rows(
    file: Path, lines: Lines, done: Callable[[int], int], offset: int, text_field: str, strict: bool
) -> Iterator[Row]:
    """CSV or TSV with a header; its delimiter is the first of some with which the header has the field."""
    csv.field_size_limit(MAX_ROW_BYTES)
    is_tsv = ".tsv" in file.name.lower()
    is_plain = strict and is_tsv and not written_as_csv(head_of(file).decode("utf-8", "replace"))
    first = lines.take(MAX_ROW_BYTES).decode("utf-8", "replace")
    delimiters = "\t,;|" if is_tsv else ",;\t|"
    headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in delimiters}
    if is_plain:
        headers["\t"] = first.rstrip("\r\n").split("\t")
    delimiter = next((d for d in headers if form_in(headers[d], text_field, strict)), delimiters[0])
    header = headers[delimiter]
    if (wanted := form_in(header, text_field, strict)) is None:
        raise NoText(without_text(text_field, header))
    if twice := [name for name in wanted if header.count(name) > 1]:
        raise Unreadable(f"its header has the field {twice[0]!r} twice")
    lines.skip_to(max(offset, lines.offset))
    if not strict:
        texts = (raw.decode("utf-8", "replace") for raw in iter(lambda: lines.take(MAX_ROW_BYTES), b""))
        for values in filter(None, csv.reader(texts, delimiter=delimiter)):
            yield Row(dict(zip(header, values, strict=False)), lines.offset, done(lines.offset))
        return
    is_plain = is_plain and delimiter == "\t"
    records = tsv_records(lines, len(header)) if is_plain else csv_records(lines, len(header), delimiter)
    for values, at, damage in records:
        yield Row(None if damage else dict(zip(header, values, strict=True)), at, done(at), damage)


def _parquet_rows(raw: BinaryIO, size: int, offset: int, text_field: str, strict: bool) -> Iterator[Row]:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(raw)
    columns = _columns(parquet.schema_arrow, text_field, strict)
    groups = range(parquet.metadata.num_row_groups)
    rows = [parquet.metadata.row_group(group).num_rows for group in groups]
    first = row = 0  # the row group with the offset in it, and its first row
    while first < len(rows) and row + rows[first] <= offset:
        row += rows[first]
        first += 1
    batches = (  # a group at a time, so that those before a damaged one are read
        batch for group in groups[first:] for batch in parquet.iter_batches(BATCH_ROWS, [group], columns=columns)
    )
    for batch in batches:
        for values in zip(*batch.columns, strict=True):  # one by one: a dictionary's long text may stand in every row
            row += 1
            if row > offset:
                yield Row(_python_row(batch.schema.names, values), row, size * row // parquet.metadata.num_rows)


def _arrow_rows(raw: BinaryIO, offset: int, text_field: str, strict: bool) -> Iterator[Row]:
    magic = raw.read(6)
    schema, batches = arrow_batches(raw)
    row, columns = 0, _columns(schema, text_field, strict)
    names = [name if name in schema.names else name.partition(".")[0] for name in columns]
    for batch in batches:
        for values in zip(*map(batch.column, names), strict=True) if row + batch.num_rows > offset else ():
            row += 1
            if row > offset:
                yield Row(_python_row(names, values), row, raw.tell())
        row = max(row, min(offset, row + batch.num_rows))
    if strict and magic != b"ARROW1":
        at, end = raw.tell(), ARROW_END if magic.startswith(ARROW_END[:4]) else ARROW_END[4:]
        raw.seek(max(0, at - len(end)))
        if raw.read(len(end)) != end:
            yield Row(
                None, row, at, "the stream has no end marker: it may have been cut, and rows after these are lost"
            )


def arrow_batches(raw: BinaryIO) -> tuple[Any, Iterable[Any]]:
    """The schema and the batches of an Arrow file or stream; `datasets` writes streams, which end with a marker."""
    import pyarrow.ipc

    raw.seek(0)
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    if is_file:
        file = pyarrow.ipc.open_file(raw)
        return file.schema, map(file.get_batch, range(file.num_record_batches))
    stream = pyarrow.ipc.open_stream(raw)
    return stream.schema, stream


def look_at_footer(raw: BinaryIO, text_field: str, strict: bool) -> list[str]:
    """The columns of a parquet file. Raises NoText if it has no texts."""
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(raw)
    columns, metadata = _columns(parquet.schema_arrow, text_field, strict), parquet.metadata
    if metadata.num_rows == 0:
        raise NoText("it has no rows")
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        facts = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == columns[0]]
        nulls = [fact.statistics.null_count for fact in facts if fact.statistics and fact.statistics.has_null_count]
        if nulls != [group.num_rows]:
            return parquet.schema_arrow.names
    raise NoText(without_text(text_field, ()))


def _python_row(names: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    return {name: _python_value(value) for name, value in zip(names, values, strict=True)}


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:  # nothing in a parquet file says that a string's bytes are UTF-8
        return value.as_buffer().to_pybytes() if hasattr(value, "as_buffer") else None


def _columns(schema: Any, text_field: str, strict: bool) -> list[str]:
    """The columns with the text, the chat or the pair."""
    names = list(_names(schema))
    if (form := form_in(names, text_field, strict)) is None:
        raise NoText(without_text(text_field, names))
    return [*form]


def _names(fields: Any, outer: str = "") -> Iterator[str]:
    """Names of a schema's columns; those in a column `a` are named `a.b`."""
    import pyarrow

    for field in fields:
        yield outer + field.name
        if pyarrow.types.is_struct(field.type):
            yield from _names(field.type, f"{outer}{field.name}.")


def names_in(row: Any, outer: str = "") -> Iterator[str]:
    """The names of a row's fields; that of a field `b` in a field `a` is `a.b`."""
    for name, value in row.items() if isinstance(row, dict) else ():
        yield outer + name
        yield from names_in(value, f"{outer}{name}.")
