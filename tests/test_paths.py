"""Every public function takes its paths as text, as `Path` and as any `os.PathLike`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import jaxllm
from jaxllm import TrainConfig, UserError
from jaxllm.config import RunConfig

MODULES = (
    "jaxllm.generate", "jaxllm.evaluate", "jaxllm.run.checkpoint", "jaxllm.run.checkpoint_writer", "jaxllm.run.lock",
    "jaxllm.run.metrics", "jaxllm.run.prepare", "jaxllm.run.replay", "jaxllm.run.reporting", "jaxllm.run.tensorboard",
    "convert.to_flax", "convert.to_torch", "convert.training", "parity_tests.report", "parity_tests.text",
    "torch_ref.checkpoint", "torch_ref.generate",
)  # fmt: skip
"""What users import; other modules are called with a `Path`."""


class OtherPath:
    """Not a `Path`."""

    def __init__(self, path: Path):
        self._path = str(path)

    def __fspath__(self) -> str:
        return self._path


def public_functions() -> Iterator[tuple[str, Callable, Any]]:
    for name in MODULES:
        for attribute, found in vars(importlib.import_module(name)).items():
            if getattr(found, "__module__", None) != name or attribute.startswith("_"):
                continue
            if inspect.isfunction(found):
                yield f"{name}.{attribute}", found, found
            elif inspect.isclass(found) and "__init__" in vars(found) and not dataclasses.is_dataclass(found):
                yield f"{name}.{attribute}", found, found.__init__


def hints_of(function: Any) -> dict[str, Any]:
    """The annotations; names that are imported for the type checker alone are `Any`."""
    names = {"PreTrainedTokenizerBase": Any, "Figure": Any, "Prepared": list}
    return typing.get_type_hints(inspect.unwrap(function), localns=names)


def kinds_in(hint: Any) -> list[Any]:
    return [hint, *(kind for inner in typing.get_args(hint) for kind in kinds_in(inner))]


def takes_a_path(parameter: str, hint: Any) -> bool:
    return parameter != "return" and (Path in kinds_in(hint) or os.PathLike[str] in kinds_in(hint))


CALLED = {
    f"{name}-{parameter}": (function, parameter, signature)
    for name, function, signature in public_functions()
    for parameter, hint in hints_of(signature).items()
    if takes_a_path(parameter, hint)
}


def test_the_paths_of_the_facade_are_among_them():
    for name in ("load_model", "from_pretrained", "save_pretrained"):
        assert any(getattr(jaxllm, name) is function for function, _, _ in CALLED.values()), name
    assert len(CALLED) > 30


@pytest.mark.parametrize("name", CALLED)
def test_a_public_function_takes_any_path(name, tmp_path, monkeypatch):
    """With a folder that is not there, and stand-ins for everything else, it does the same for each kind of path."""
    function, parameter, signature = CALLED[name]
    hint = hints_of(signature)[parameter]
    assert str in kinds_in(hint), f"{parameter} is {hint}: it must be StrPath"
    assert os.PathLike[str] in kinds_in(hint), f"{parameter} is {hint}: it must be StrPath"
    many = "Sequence" in str(hint)
    outcomes = []
    for number, kind in enumerate((Path, str, OtherPath)):
        base = tmp_path / str(number)
        base.mkdir()
        monkeypatch.chdir(base)
        others = {
            other: base / f"other-{other}"
            if os.PathLike[str] in kinds_in(hints_of(signature).get(other))
            else MagicMock()
            for other, known in inspect.signature(function).parameters.items()
            if known.default is inspect.Parameter.empty and other not in (parameter, "self")
        }
        path = kind(base / "missing")
        try:
            made = function(**others, **{parameter: [path] if many else path})
            if inspect.isgenerator(getattr(made, "gen", None)):  # a context manager
                with made:
                    pass
            outcomes.append("returns")
        except Exception as error:
            said = re.sub(
                r"id='\d+'|[a-z0-9_]{8}(?=['/])", "", str(error).replace(str(base), "")
            )  # a mock's, a scratch folder's
            outcomes.append((type(error).__name__, said))
    assert outcomes[1:] == outcomes[:1] * 2


@pytest.mark.parametrize("kind", [str, Path, OtherPath])
def test_a_config_takes_any_path(kind, tmp_path):
    options = {"run_dir": kind(tmp_path), "data": kind(tmp_path), "tokenizer": kind(tmp_path)}
    config = TrainConfig.from_options(**options, init=kind(tmp_path))
    assert (config.run_dir, config.init, config.data.source) == (tmp_path, tmp_path, str(tmp_path))
    assert config.folder == tmp_path
    assert config.data.tokenizer == str(tmp_path)
    assert RunConfig.from_options(**options).run_dir == tmp_path
    assert TrainConfig.from_dict(config.to_dict()).init == tmp_path
    with pytest.raises(UserError, match="run_dir is 3: it must be Path or None"):
        TrainConfig.from_options(run_dir=3)
    with pytest.raises(UserError, match=f"steps is '{tmp_path}': it must be int"):
        TrainConfig.from_options(steps=str(tmp_path))
