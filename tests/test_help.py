"""`--help` shows the options that most runs need, `--help-all` every one."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

from jaxllm.command_line import parse
from jaxllm.config import RunConfig, TrainConfig
from jaxllm.config.fields import option, option_names
from jaxllm.generate import GenerateArgs
from jaxllm.plan.__main__ import PlanArgs


@dataclasses.dataclass(frozen=True)
class Group:
    seen: int = option(1, common=True)
    hidden: int = option(2)


@dataclasses.dataclass(frozen=True)
class Config:
    group: Group = dataclasses.field(default_factory=Group)


@pytest.fixture(autouse=True)
def one_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")


def said(kind, argument: str, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(kind, [argument], "program", "What it does.")
    assert stopped.value.code == 0
    return capsys.readouterr().out


def shown(help_text: str) -> list[str]:
    """Options in the order in which a help lists them, with a frame or without; flags without their negative form."""
    return [name for name in re.findall(r"(?m)^[│ ] --([a-z][a-z0-9.-]*)", help_text) if name != "help"]


def declared(kind, prefix: str = "") -> dict[str, bool]:
    """Each option of a config and whether it is declared as common, read without the code that is tested."""
    found, hints = {}, typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        group = field.default_factory
        if field.name == "model":
            found |= declared(type(group()), "model.")
        elif prefix and dataclasses.is_dataclass(group):
            found |= declared(group, f"{prefix}{field.name}.")
        elif dataclasses.is_dataclass(group):
            found |= declared(group)
        elif "Suppress" not in str(hints[field.name]):  # a run decides it, not a command line
            name = prefix + option_names(kind)[field.name]
            found[name.replace("_", "-")] = field.metadata.get("common", False)
    return found


@pytest.mark.parametrize("kind", [TrainConfig, RunConfig])
def test_the_short_help_lists_the_common_options_and_says_how_to_see_the_rest(kind, capsys):
    text = said(kind, "--help", capsys)
    assert sorted(shown(text)) == sorted(name for name, common in declared(kind).items() if common)
    assert 15 <= len(shown(text)) <= 24
    assert "--help-all lists every one" in text
    assert said(kind, "-h", capsys) == text


@pytest.mark.parametrize("kind", [TrainConfig, RunConfig])
def test_the_long_help_lists_every_option_and_the_models_last(kind, capsys):
    names = shown(said(kind, "--help-all", capsys))
    assert sorted(names) == sorted(declared(kind))
    first_of_model = next(i for i, name in enumerate(names) if name.startswith("model."))
    assert all(name.startswith("model.") for name in names[first_of_model:])


def test_an_option_that_the_short_help_leaves_out_is_read(capsys):
    config = parse(TrainConfig, ["--keep-checkpoints", "5", "--model.dropout", "0.2"], "program")
    assert (config.checkpoint.keep_checkpoints, config.model.dropout) == (5, 0.2)


def test_a_command_without_common_options_shows_all_of_them_in_its_help(capsys):
    text = said(GenerateArgs, "--help", capsys)
    assert {"max-new-tokens", "top-k", "ignore-eos"} <= {*shown(text)}
    assert "--help-all" not in text
    assert {"target", "lora-rank", "lora-alpha"} <= {*shown(said(PlanArgs, "--help", capsys))}  # a group of train.py


def test_a_new_option_appears_in_the_short_help_only_if_it_is_declared_as_common(capsys):
    assert shown(said(Config, "--help", capsys)) == ["group.seen"]
    assert shown(said(Config, "--help-all", capsys)) == ["group.seen", "group.hidden"]
