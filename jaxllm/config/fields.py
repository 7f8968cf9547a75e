"""Declarations of config fields (range, whether a resumed run may change them), and the check of all of them."""

import dataclasses
import functools
import os
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxllm.errors import UserError, shown

MAX_INT = 2**31 - 1
"""Upper bound of integer fields that declare none: a config may be untrusted input."""

MAX_SEED = 2**63 - 1


def option(
    default: Any = dataclasses.MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    resumable: bool = False,
    saved: bool = True,
    common: bool = False,
) -> Any:
    """A config field with its bounds; None always passes.

    Args:
        default: without one, the field is required.
        ge, gt, le, lt: bounds, inclusive and exclusive.
        resumable: a resumed run may change it, because it does not change the run's numbers.
        saved: whether train_config.json has it. An option for a single start, such as `overwrite`, is not saved.
        common: many runs need it; `--help` shows only these, `--help-all` every option.
    """
    facts = {"ge": ge, "gt": gt, "le": le, "lt": lt, "resumable": resumable, "saved": saved, "common": common}
    return dataclasses.field(default=default, metadata=facts)


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def option_names(cls: type) -> dict[str, str]:
    """The command-line option of each field: the field's name, or the name in its tyro annotation."""
    names = {}
    for field in dataclasses.fields(cls):
        annotations = getattr(_type_hints(cls)[field.name], "__metadata__", ())
        given = next(filter(None, (getattr(annotation, "name", None) for annotation in annotations)), None)
        names[field.name] = (given or field.name).replace("-", "_")
    return names


def check_fields(config: Any) -> None:
    """Check the type and the range of every field; convert ints in float fields, and paths to the field's type.

    Raises:
        UserError: a value has another type or is outside its range.
    """
    for field in dataclasses.fields(config):
        name = option_names(type(config))[field.name]
        value: Any = getattr(config, field.name)
        hint = _type_hints(type(config))[field.name]
        hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if not _matches(value, hint):
            value = _converted_path(value, hint)
            object.__setattr__(config, field.name, value)
        if not _matches(value, hint):
            wanted = typing.get_args(hint) or (hint,)
            raise UserError(f"{name} is {shown(value)}: it must be {' or '.join(map(_named, wanted))}")
        if hint is float:
            object.__setattr__(config, field.name, float(value))  # JAX refuses an int beyond 32 bits
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(name, value, field.metadata)


def _converted_path(value: Any, hint: Any) -> Any:
    """A path as the `Path` or the text that the field holds; anything else as it is."""
    choices = typing.get_args(hint) if _is_union(hint) else (hint,)
    if isinstance(value, str | os.PathLike) and Path in choices:
        return Path(value)
    return os.fspath(value) if isinstance(value, os.PathLike) and str in choices else value


def _named(choice: Any) -> str:
    """A type, or one of a Literal's values, for a message."""
    known = {float: "a finite number", types.NoneType: "None"}
    return known.get(choice) or getattr(choice, "__name__", str(choice))


def _check_range(name: str, value: float, bounds: Mapping[str, Any]) -> None:
    ge, gt, le, lt = (bounds.get(kind) for kind in ("ge", "gt", "le", "lt"))
    if le is None and lt is None and isinstance(value, int):
        le = MAX_INT
    below = (ge is not None and value < ge) or (gt is not None and value <= gt)
    above = (le is not None and value > le) or (lt is not None and value >= lt)
    if not (below or above):
        return
    if lt is not None or (gt is not None and le is not None):
        lower, upper = f"({gt}" if ge is None else f"[{ge}", f"{lt})" if le is None else f"{le}]"
        raise UserError(f"{name} is {shown(value)}: it must lie in {lower}, {upper}")
    bound = f"at most {le}" if above else f"larger than {gt}" if ge is None else f"at least {ge}"
    raise UserError(f"{name} is {shown(value)}: it must be {bound}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)  # the latter of a Literal and None


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value, perhaps read from JSON, has the annotated type; ints pass for floats."""
    if _is_union(hint):
        return any(_matches(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_matches(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:  # no NaN, no infinity
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
