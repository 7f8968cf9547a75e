"""Rows of JSON files: lines, an array, or objects over several lines. An object in which a key occurs twice is damage.

In place of a damaged row there is the reason, in a few words.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any, BinaryIO, Literal

from jaxllm.data.lines import BLOCK, Unreadable, head_of
from jaxllm.errors import shown

MAX_DOCUMENT_BYTES = 2 << 30
"""A longer file that is not JSON lines is refused: it is read at once."""

MAX_HEAD = 1 << 20
"""Bytes in which the first object ends, if it is written over several lines."""

_SPACE = re.compile(r"\s*")

JsonForm = Literal["lines", "array", "objects"]


def form_of(file: Path) -> JsonForm:
    """How a JSON file is written: an array, or objects of which the first ends in a later line, or lines."""
    for size in (BLOCK, MAX_HEAD):
        text = head_of(file, size).decode("utf-8", "replace").lstrip()
        first, _, rest = text.partition("\n")
        if text[:1] not in ("[", "{") or (_is_json(first) and (text[0] == "{" or rest.strip())):
            return "lines"
        if text[0] == "[":
            return "array"
        with contextlib.suppress(ValueError, RecursionError):
            return "objects" if json.JSONDecoder().raw_decode(text)[1] > len(first) else "lines"
    return "lines"


class Decoder:
    """Decodes objects; in one with a key that occurs twice, parsers disagree on which one wins."""

    def __init__(self):
        self._repeated = False
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def line(self, line: str) -> dict[str, Any] | str:
        """A line's object, or what is wrong with it."""
        line = line.strip()
        try:
            row, end = self.at(line, 0)
        except json.JSONDecodeError as error:
            is_cut = error.pos >= len(line) or error.msg.startswith("Unterminated")
            return "a line that is cut off" if is_cut else f"a line that is not JSON: {error.msg}"
        except (ValueError, RecursionError):  # a number of too many digits, or too many brackets
            return "a line with too long a number, or nested too deep"
        if rest := line[end:].strip():
            return "several values on one line" if rest[0] in '{["' else "text after the object on a line"
        return row

    def at(self, text: str, start: int) -> tuple[dict[str, Any] | str, int]:
        """The object that starts there, and where it ends. Raises ValueError if there is no JSON."""
        self._repeated = False
        row, end = self._decoder.raw_decode(text, start)
        if self._repeated:
            return "an object with a key that occurs twice", end
        return row if isinstance(row, dict) else "a value that is not a JSON object", end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        self._repeated = self._repeated or len(values) < len(pairs)
        return values


def document_rows(stream: BinaryIO, form: JsonForm) -> list[dict[str, Any] | str]:
    """The rows of an array, or objects one after another, which are read at once; for a damaged one, the reason.

    Raises:
        Unreadable: it is too long.
        ValueError: it is damaged.
    """
    content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise Unreadable(f"it is JSON of more than {MAX_DOCUMENT_BYTES >> 30} GiB, and not a row a line: write JSONL")
    text = content.decode("utf-8-sig", "replace")
    decoder, rows, at = Decoder(), [], _after_space(text, 0) + (form == "array")
    while (at := _after_space(text, at)) < len(text):
        if form == "array" and text[at] == "]" and not (rows and text[at - 1] == ","):
            if end := text[at + 1 :].strip():
                raise ValueError(f"after the array there is {shown(end[:20])}")
            return rows
        row, at = decoder.at(text, at)
        rows.append(row)
        at = _after_space(text, at)
        if form == "array" and text[at : at + 1] == ",":
            at += 1
        elif form == "array" and text[at : at + 1] != "]":
            raise ValueError(f"the array is damaged after its row {len(rows)}")
    if form == "array":
        raise ValueError("the array has no end")
    return rows


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
