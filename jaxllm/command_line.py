"""The command line of every command: a dataclass whose fields are the options, read by tyro."""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from jaxllm.errors import UserError

HELP_ALL = "--help-all"


def expanded(path: str | Path) -> Path:
    """A path of a command line. The shell leaves `~` in `--run-dir=~/run` as it is."""
    return Path(os.path.expanduser(path))


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


def _registry(*, all_options: bool) -> ConstructorRegistry:
    """How tyro reads our types.

    Args:
        all_options: False leaves out the options that are not declared as common, which is for a short help only.
    """
    registry = ConstructorRegistry()
    registry.primitive_rule(_path)
    reading: list[type] = []  # the rule asks for tyro's own reading of a dataclass, and is asked again for that

    @registry.struct_rule
    def options(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type in reading:
            return None
        reading.append(info.type)
        spec = ConstructorRegistry.get_struct_spec(info)
        reading.remove(info.type)
        if not isinstance(spec, StructConstructorSpec):
            return None
        if not has_common_options(info.type):
            return spec
        common = {field.name for field in dataclasses.fields(info.type) if _is_common(field)}

        def shown(field: StructFieldSpec) -> StructFieldSpec:
            if all_options or field.name in common:
                return field
            return dataclasses.replace(field, type=Annotated[field.type, tyro.conf.Suppress])

        # groups with a prefix, the model's, are long: last
        fields = sorted(map(shown, spec.fields), key=lambda field: dataclasses.is_dataclass(field.type))
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


@functools.cache
def has_common_options(kind: Any) -> bool:
    """Whether a dataclass, or a group of options in it, declares a common option (`jaxllm.config.fields.option`)."""
    return dataclasses.is_dataclass(kind) and any(map(_is_common, dataclasses.fields(kind)))


def _is_common(field: dataclasses.Field) -> bool:
    return field.metadata.get("common", False) or has_common_options(field.default_factory)


def parse(kind: Any, argv: Sequence[str] | None, prog: str, description: str | None = None, **options: Any) -> Any:
    """An instance of `kind` from a command line.

    Args:
        kind: a dataclass, or a union of them.
        description: for --help; a line that begins with `python` is an example and stays a line.
        options: of `tyro.cli`.

    Of an option that is given twice, the last value counts. Where options are declared as common, `--help` shows these,
    and `--help-all` every option, with the groups that have a prefix last.

    Raises:
        UserError: --data is given twice, which looks like two sources.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    given = [name.partition("=")[0] for name in arguments]
    if given.count("--data") > 1:
        raise UserError("--data is given twice: leave one out; several sources need weights: --data A=0.7,B=0.3")
    short = has_common_options(kind) and HELP_ALL not in arguments and bool({"-h", "--help"} & {*arguments})
    if has_common_options(kind):
        arguments = ["--help" if argument == HELP_ALL else argument for argument in arguments]
    if short:
        description = f"{description or ''}\n\nThese are the options that most runs need; {HELP_ALL} lists every one."
    # tyro keeps the break before a line that is indented
    shown = description and re.sub("(?m)^python ", "    python ", description)
    return tyro.cli(
        kind, args=arguments, prog=prog, description=shown, registry=_registry(all_options=not short), **options
    )
