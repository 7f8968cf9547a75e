"""The command line of every command: a dataclass whose fields are the options, read by tyro."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def expanded(path: str | Path) -> Path:
    """A path of a command line. The shell leaves `~` in `--run-dir=~/run` as it is."""
    return Path(os.path.expanduser(path))


_registry = ConstructorRegistry()


@_registry.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: expanded(given[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def parse(kind: Any, argv: Sequence[str] | None, prog: str, description: str | None = None, **options: Any) -> Any:
    """An instance of `kind` from a command line.

    Args:
        kind: a dataclass, or a union of them.
        description: for --help; a line that begins with `python` is an example and stays a line.
        options: of `tyro.cli`.
    """
    # tyro keeps the break before a line that is indented
    shown = description and re.sub("(?m)^python ", "    python ", description)
    return tyro.cli(kind, args=argv, prog=prog, description=shown, registry=_registry, **options)
