"""The site's tables are those of the code, and what the pages name exists."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import convert
import jaxllm
import parity_tests
import torch_ref
from jaxllm.config import TrainConfig, recipe
from jaxllm.config.fields import option
from tests.test_help import declared

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    file for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")) if file.is_file()
)


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


options = hook("options")


@pytest.fixture(scope="module")
def training_tables() -> dict[str, list[str]]:
    """The cells of each option of train.py, as the site has them."""
    page = options.on_page_markdown("<!-- options: jaxllm.config TrainConfig -->")
    rows = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| `--")]
    return {cells[0].strip("`"): cells[1:] for cells in rows}


def test_the_table_has_every_option_of_the_command_line_and_no_other(training_tables):
    assert sorted(training_tables) == sorted(f"--{name}" for name in declared(TrainConfig))


def test_the_table_says_the_default_the_range_and_what_a_resumed_run_may_change(training_tables):
    assert training_tables["--save-every"][:3] == ["`200`", "integer >= 1", "yes"]
    assert training_tables["--learning-rate"][:3] == ["`0.008`", "number >= 0", "no"]
    assert training_tables["--beta1"][:3] == ["`0.9`", "number >= 0, < 1", "no"]
    assert training_tables["--optimizer"][:3] == ["`muon`", "`adamw`, `muon`", "no"]
    assert training_tables["--overwrite"][:3] == ["off", "flag", "not kept"]
    assert training_tables["--seed"][1] == "integer >= 0, <= 2^63 - 1"
    assert training_tables["--model.hidden-size"][:3] == ["`192`", "integer >= 1, <= 2^20", "no"]


def test_the_defaults_of_the_table_are_those_of_the_default_run(training_tables):
    defaults = recipe("default", "tiny").options()
    for name in ("steps", "batch_size", "muon_momentum", "bias_update_rate", "eval_every", "schedule"):
        assert training_tables["--" + name.replace("_", "-")][0] == f"`{defaults[name]}`"


def test_every_option_has_a_meaning_in_its_table(training_tables):
    short = {name for name, cells in training_tables.items() if len(cells[3].split()) < 2}
    assert short <= {"--model.lm-head-bias"}  # transformers' own name says it


@dataclasses.dataclass(frozen=True)
class Declared:
    seen: int | None = option(None, gt=0, lt=10)
    """What | it does."""


def test_a_declaration_alone_makes_the_row():
    (title, rows) = next(options.sections(Declared, None, "Any"))
    assert title == "Any"
    assert options._line(rows[0]) == "| `--seen` | none | integer > 0, < 10 | no | What \\| it does. |"


def test_every_page_of_options_names_classes_that_exist():
    page = (ROOT / "docs" / "reference" / "options.md").read_text()
    found = options.MARKER.findall(page)
    assert len(found) >= 10
    for module, kind in found:
        assert dataclasses.is_dataclass(getattr(importlib.import_module(module), kind))


def test_the_python_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    listed = {name.rpartition(".")[2] for name in re.findall(r"(?m)^::: (\S+)", page)}
    for package in (jaxllm, torch_ref, parity_tests):
        assert {*package.__all__} <= listed
    assert convert.__doc__
    for path in re.findall(r"(?m)^::: (\S+)", page):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def said_in_code() -> str:
    """Every text of the product; what is put into it becomes `{}`."""
    texts = []
    files = [
        file for room in ("jaxllm", "convert", "torch_ref", "parity_tests") for file in ROOT.glob(f"{room}/**/*.py")
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.JoinedStr(values):
                    texts.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in values))
                case ast.Constant(str(text)):
                    texts.append(text)
    return "\n".join(texts)


def test_the_messages_that_the_page_of_errors_explains_exist():
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    rows = [line.split(" | ")[0] for line in page.split("## Exit codes")[0].splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    known = said_in_code()
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    parts = [part.strip() for message in messages for part in re.split(r"\.\.\.|\b(?:NAME|VALUE)\b|\d+", message)]
    assert [part for part in parts if part not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_links_to_exist(page):
    for target in re.findall(r"\]\(([^()\s:#]+)(?:#[^()\s]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_file_of_the_documentation_that_code_or_a_page_names_exists():
    files = [file for kind in ("py", "md", "toml") for file in ROOT.rglob(f"*.{kind}") if ".venv" not in str(file)]
    for file in files:
        for name in re.findall(r"\bdocs/[a-z0-9_/-]+\.(?:md|png)", file.read_text(errors="replace")):
            assert (ROOT / name).exists(), f"{file}: {name}"


def test_pictures_of_the_documentation_are_small():
    pictures = [*ROOT.glob("docs/**/*.png"), *ROOT.glob("docs/**/*.svg")]
    assert pictures
    assert [str(file) for file in pictures if file.stat().st_size > 300_000] == []
