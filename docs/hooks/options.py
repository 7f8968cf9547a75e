"""Writes the tables of options into a page when the site is built, from the dataclasses that declare them.

The tables are not in git, so they cannot be out of date, and the declarations stay the only list.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxllm.config import TrainConfig, recipe
from jaxllm.config.fields import option_names

MARKER = re.compile(r"<!-- options: (?P<module>\S+) (?P<kind>\S+) -->")


class Row(NamedTuple):
    """What a table says about an option."""

    flag: str
    default: str
    values: str
    resume: str
    meaning: str


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each marker by the tables of the options that a class declares. MkDocs calls this for each page."""
    return MARKER.sub(lambda found: "\n\n".join(tables(found["module"], found["kind"])), markdown)


def tables(module: str, kind: str) -> Iterator[str]:
    """The tables of the options of a class, one for each group, as Markdown."""
    declared = getattr(importlib.import_module(module), kind)
    training = declared is TrainConfig
    defaults = recipe("default", "tiny") if training else None
    for title, rows in sections(declared, defaults, "Run"):
        heading = [f"### {title}\n"] if training else []
        columns = ["option", "default", "values", *(["on resume"] if training else []), "meaning"]
        lines = [row if training else row[:3] + row[4:] for row in rows]
        yield "\n".join([*heading, _line(columns), _line(["---"] * len(columns)), *map(_line, lines)])


def sections(kind: type, defaults: Any, title: str, prefix: str = "") -> Iterator[tuple[str, list[Row]]]:
    """The options of a dataclass, then those of each group in it; groups with a prefix (the model's) last."""
    hints, meanings, names = typing.get_type_hints(kind, include_extras=True), _meanings(kind), option_names(kind)
    rows, groups = [], []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        value = _default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            prefixed = dataclasses.is_dataclass(hint)  # not an `Annotated` that omits it
            name = field.name.replace("_", "-")
            groups.append((prefixed, type(value), value, name, f"{prefix}{name}." if prefixed else prefix))
        elif "Suppress" not in str(hint):
            name = names[field.name].replace("_", "-")
            flag = name.upper() if "Positional" in str(hint) else f"--{prefix}{name}"
            rows.append(Row(flag, _shown(value), _values(hint, field.metadata), _resume(field), meanings[field.name]))
    yield title, rows
    for _, kind, value, name, inner in sorted(groups, key=lambda group: group[0]):
        yield from sections(kind, value, name.capitalize(), inner)


def _line(cells: Any) -> str:
    first, *rest = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    code = f"`{first}`" if re.match("--[a-z]|[A-Z]", first) else first
    return f"| {' | '.join([code, *rest])} |"


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value in ("", ()):
        return "none"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value) if any(value) else "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _values(hint: Any, bounds: Mapping[str, Any]) -> str:
    """What an option takes: its choices, or its type and range."""
    if typing.get_origin(hint) is typing.Annotated:
        return _values(typing.get_args(hint)[0], bounds)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        choices = [choice for choice in typing.get_args(hint) if choice is not types.NoneType]
        return " or ".join(dict.fromkeys(_values(choice, bounds) for choice in choices))
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"{_values(typing.get_args(hint)[0], bounds)}, several"
    name = {int: "integer", float: "number", str: "text", bool: "flag", Path: "path"}[hint]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {_number(bounds[kind])}" for kind, sign in signs.items() if bounds.get(kind) is not None]
    return " ".join([name, ", ".join(limits)]).strip() if hint in (int, float) else name


def _number(bound: float) -> str:
    """A bound, with a large one that is a power of two as such."""
    for rest in (0, 1):
        if isinstance(bound, int) and bound >= 2**14 and (bound + rest).bit_count() == 1:
            return f"2^{(bound + rest).bit_length() - 1}" + " - 1" * rest
    return f"{bound:,g}"


def _resume(field: dataclasses.Field) -> str:
    """Whether a resumed run may be given another value."""
    if not field.metadata.get("saved", True):
        return "not kept"
    return "yes" if field.metadata.get("resumable") else "no"


def _meanings(kind: type) -> dict[str, str]:
    """The help of each field: what its annotation gives to tyro, or the docstring below it."""
    found = {field.name: "" for field in dataclasses.fields(kind)}
    for cls in reversed(kind.__mro__):
        if dataclasses.is_dataclass(cls):
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # pyright: ignore
            for node, after in pairwise(body):
                match node, after:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        found[name] = " ".join(inspect.cleandoc(text).split())
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            found[name] = getattr(extra, "help", None) or found[name]
    return found
