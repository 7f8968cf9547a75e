"""How something out of a file appears in a message: short, and on one line, whatever it holds."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlevel = 3

MOST_NAMES = 20


def shown(value: Any) -> str:
    """`repr`, with its middle left out where it is long; a value nested deeply does no harm."""
    return _repr.repr(value)


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are. A name that would break the line or hide in it is quoted."""
    names = list(names)
    first = [name if name.isprintable() and len(name) <= 120 else shown(name) for name in names[:MOST_NAMES]]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
