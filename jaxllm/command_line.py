"""The command line of every command: a dataclass whose fields are the options, read by tyro."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jaxllm.errors import UserError


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

    Of an option that is given twice, the last value counts.

    Raises:
        UserError: --data is given twice, which looks like two sources.
    """
    given = [name.partition("=")[0] for name in (sys.argv[1:] if argv is None else argv)]
    if given.count("--data") > 1:
        raise UserError("--data is given twice: leave one out; several sources need weights: --data A=0.7,B=0.3")
    # tyro keeps the break before a line that is indented
    shown = description and re.sub("(?m)^python ", "    python ", description)
    return tyro.cli(kind, args=argv, prog=prog, description=shown, registry=_registry, **options)
