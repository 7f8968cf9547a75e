"""Files as somebody hostile, or a failing disk, would make them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

HUGE_NUMBER = "@a number of 5000 digits@"
"""Python itself writes no such number; it is put in its place in the text."""

TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(codec=None), max_size=6),  # halves of surrogate pairs among them
    st.sampled_from(
        ["", "\x00", "\ud800", "a\nb", "\x1b[2J\r\u2028", "../../etc/passwd", "/etc/passwd", "{{ 1 }}", "x" * 5000]
    ),
)

INTEGERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([-1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**15, 10**400, -(2**63)]),
)

FLOATS = st.one_of(st.floats(), st.sampled_from([1e308, 1e-320, float("nan"), float("inf"), -float("inf")]))

SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS, st.just(HUGE_NUMBER))

VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


def written(value: Any) -> bytes:
    """As JSON, with what only a text can say: NaN, numbers without end, halves of surrogate pairs."""
    return json.dumps(value).replace(json.dumps(HUGE_NUMBER), "9" * 5000).encode()


@st.composite
def changed(draw, value: Any, deep: int = 6) -> Any:
    """A JSON value with some of its parts replaced, removed or added, at any depth."""
    for _ in range(draw(st.integers(1, 3))):
        value = _changed_once(draw, value, deep)
    return value


def _changed_once(draw, value: Any, deep: int) -> Any:
    if not deep or not value or not isinstance(value, (Mapping, list)) or draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        rest = [[], [_changed_once(draw, value[at], deep - 1)], [value[at], draw(VALUES)]]
        return value[:at] + draw(st.sampled_from(rest)) + value[at + 1 :]
    key = draw(st.sampled_from(sorted(value)))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "gone", "more", "renamed"]))
    if kind == "inside":
        return value | {key: _changed_once(draw, value[key], deep - 1)}
    if kind == "more":
        return value | {draw(TEXTS): draw(VALUES)}
    rest = {k: v for k, v in value.items() if k != key}
    return rest if kind == "gone" else rest | {draw(TEXTS): value[key]}


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A file with bytes flipped, cut off, left out, repeated or put in."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        size = draw(st.sampled_from([1, 2, 8, 100]))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "leave out", "repeat", "put in", "zero"]))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "leave out":
            content = content[:at] + content[at + size :]
        elif kind == "repeat":
            content = content[: at + size] + content[at:]
        elif kind == "put in":
            content = content[:at] + draw(st.binary(max_size=8)) + content[at:]
        else:
            content = content[:at] + b"\0" * size + content[at + size :]
    return content


@st.composite
def json_files(draw, value: Any) -> bytes:
    """A JSON file whose values are others, whose bytes are damaged, or which is something else altogether."""
    kind = draw(st.sampled_from(["values", "values", "values", "bytes", "bytes", "twice", "odd"]))
    if kind == "values":
        return written(draw(changed(value)))
    if kind == "bytes":
        return draw(damaged(written(value)))
    if kind == "twice":
        key = draw(st.sampled_from(sorted(value)))
        return b"{" + written({key: draw(VALUES)})[1:-1] + b", " + written(value)[1:]
    deep = draw(st.sampled_from([10, 200, 900, 100_000]))
    odd = [
        b"", b"null", b"[]", b'"text"', b"\xff\xfe{}", b"\xef\xbb\xbf" + written(value),
        written(value).decode().encode("utf-16"),
        b"[" * deep, b'{"model":' * deep, b'{"model":' + b"[" * deep + b"]" * deep + b"}",
        b'{"model":' + b'{"a":' * deep + b"1" + b"}" * deep + b"}", b"1e999", b"-" * 1000,
        draw(st.binary(max_size=200)),
    ]  # fmt: skip
    return draw(st.sampled_from(odd))
