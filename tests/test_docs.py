"""The site's tables are those of the code, and what the pages name exists."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

import convert
import jaxllm
import parity_tests
import torch_ref
from benchmarks.__main__ import BenchmarkArgs
from benchmarks.curves import CurvesArgs
from benchmarks.gpu.page import PageArgs
from benchmarks.learning import LearningArgs
from convert.__main__ import Command
from jaxllm.command_line import parse
from jaxllm.config import RunConfig, TrainConfig, recipe
from jaxllm.config.fields import option
from jaxllm.doctor import DoctorArgs
from jaxllm.evaluate import EvaluateArgs
from jaxllm.generate import GenerateArgs
from jaxllm.plan.__main__ import PlanArgs
from jaxllm.run.arguments import parse_args
from jaxllm.run.replay import ReplayArgs
from parity_tests.engine.command import CompareArgs, PairArgs, RecordArgs
from parity_tests.options import ParityArgs
from tests.test_help import declared

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "parity_tests/README.md", ROOT / "benchmarks/README.md"]
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
    assert [name for name, cells in training_tables.items() if len(cells[3].split()) < 2] == []


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


def test_the_page_of_a_runs_folder_names_its_files_and_the_columns_of_its_log(run):
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text()
    for name in (path.name for path in run.iterdir() if not path.name.startswith(".jaxllm-lock")):
        assert f"`{name}" in page, name
    checkpoint = next((run / "checkpoints").iterdir())
    for name in (path.name for path in checkpoint.iterdir() if not path.name.startswith("_")):
        assert f"`{name}`" in page, name
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in {key for record in records if "step" in record for key in record}:
        assert f"`{key}`" in page, key


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


PARSERS: dict[str, Any] = {
    "train.py": TrainConfig,
    "-m torch_ref.train": RunConfig,
    "-m jaxllm.generate": GenerateArgs,
    "-m jaxllm.evaluate": EvaluateArgs,
    "-m jaxllm.plan": PlanArgs,
    "-m jaxllm.doctor": DoctorArgs,
    "-m jaxllm.run.replay": ReplayArgs,
    "-m convert": Command,
    "-m parity_tests pair": PairArgs,
    "-m parity_tests record": RecordArgs,
    "-m parity_tests compare": CompareArgs,
    "-m parity_tests": ParityArgs,
    "-m benchmarks": BenchmarkArgs,
    "-m benchmarks.curves": CurvesArgs,
    "-m benchmarks.learning": LearningArgs,
    "-m benchmarks.gpu.page": PageArgs,
}
OTHER_PROGRAMS = ("-m pytest", "-m venv", "-m pip", "-m tests.chaos", "-m parity_tests.mps_runs", "-m benchmarks gpu")


OTHER_OPTIONS = {
    "--help", "--help-all", "--batch", "--seq",  # the last two are aliases
    "--kills", "--devices",  # of tests.chaos
    "--trust-remote-code",  # also transformers'
    "--build-arg",  # of docker
}  # fmt: skip


@pytest.fixture(scope="module")
def every_flag() -> set[str]:
    """The options of all commands."""
    kinds = [kind for given in PARSERS.values() for kind in (get_args(given) or (given,))]
    kinds = [get_args(kind)[0] if get_args(kind) else kind for kind in kinds]
    rows = [row.flag for kind in kinds for _, rows in options.sections(kind, None, "") for row in rows]
    negative = {flag.replace("--", "--no-", 1) for flag in rows}
    return {*rows, *negative, *OTHER_OPTIONS}


def commands_of(text: str) -> list[str]:
    """What follows `python` in each command of a text, without its comment."""
    lines = [line.partition("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    starts = re.compile(r"(?:[A-Z_]+=\S+ )*python (?=-m |train\.py)")
    return [line[found.end() :] for line in lines if (found := starts.match(line))]


def program_of(command: str) -> str | None:
    """The longest name of PARSERS with which a command begins; None: a program of another project, or a tool."""
    names = [name for name in PARSERS if f"{command} ".startswith(f"{name} ")]
    assert names or command.startswith(OTHER_PROGRAMS), command
    return max(names, key=len) if names and not command.startswith(OTHER_PROGRAMS) else None


INIT = "--preset deepseek-v2-lite --optimizer adamw"
"""What --init gives: a long context, and AdamW."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_ones_that_the_parsers_take(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs of before
    for command in commands_of("\n".join(re.findall(r"(?ms)^```(?:bash|console)\n(.*?)^```", page.read_text()))):
        program = program_of(command)
        given = command.removeprefix(program or "").replace("--init", f"{INIT} --init")
        given = re.sub(r"--(?:init|adapter) \S+|--merge", "", given)  # for which a folder is read
        arguments = shlex.split(given.replace("STEP", "1").replace("PORT", "1234"))
        if program is None or {"--help", "--help-all"} & {*arguments}:
            continue
        kind = PARSERS[program]
        try:
            if isinstance(kind, type) and issubclass(kind, RunConfig):
                parse_args(arguments, "program", None, kind)
            elif arguments:
                parse(kind, arguments, "program")
        except SystemExit:
            pytest.fail(f"`python {command}` is not a command")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_options_that_a_page_names_exist(page, every_flag):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    for code in re.findall(r"`([^`]+)`", text):
        words = code.split()
        if words and (words[0].startswith("--") or commands_of(" ".join(words))):
            flags = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
            assert flags <= every_flag, code


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())
    assert len(block) == 1
    names: dict[str, Any] = {}
    exec(compile(block[0].replace("(2, 16)", "(1, 2)"), "README.md", "exec"), names)
    assert names["logits"].shape == (1, 2, 4096)
    assert (tmp_path / "exported" / "model.safetensors").is_file()
