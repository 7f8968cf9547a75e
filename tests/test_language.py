"""Phrases that may not come back into pages, messages and docstrings: each has a plainer form (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("jaxllm", "convert", "torch_ref", "parity_tests")

PHRASES = {
    r"(?<!there )\b(?:is|are|was|were) no (?!longer|more|less|better|worse|other)": '"is not a ..."',
    r"\b(?:that|which|it) (?:is|are) (?-i:none)\b": '"is not one", or name what is missing',
    r"\b(?:device|gpu|tpu|card|expert) that is not here\b": '"that you do not have", "on another device"',
    r"\bnobody\b": "name who, or use the passive",
    r"\ba line (?:says|that says|tells)\b|\bwhich a line says\b": '"a message reports ..."',
    r"\bwhat is known of\b": '"metadata of", "facts about"',
    r"\brun takes more\b": 'say what is added: "a resumed run may add to it"',
    r"\bit is what was written\b": '"its checksums are correct"',
    r"\bis said\b|\bare said\b": '"is reported", "is printed"',
    r"\btwin\b": '"counterpart", "matching implementation"',
    r"\bthis many,": 'begin with "Number of"',
    r"\b(?:suite|run`?) has of it\b": '"covered by"',
    r"\bhas other than\b": '"how ... differs from"',
    r"\ban array with that name\b": "say what the name does",
    r"\bwishes\b|\bforgiv(?:es|ing)\b|\bkindly\b": "a program does not feel: say what it does",
    r"\bfor free\b|\bout of the box\b|\bunder the hood\b": "an idiom: say it literally",
}
"""Each phrase with what to write instead."""

STRINGS = [ROOT / "train.py", *(file for room in PRODUCT for file in sorted((ROOT / room).rglob("*.py")))]
DOCSTRINGS = [
    ROOT / "conftest.py",
    *(file for room in ("tests", "benchmarks") for file in sorted((ROOT / room).rglob("*.py"))),
]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), ROOT / "pyproject.toml"])
FILES = [str(file.relative_to(ROOT)) for file in (*STRINGS, *DOCSTRINGS, *PAGES) if file.name != "test_language.py"]


def texts(file: Path) -> list[str]:
    """What a person reads of a file: a page without code, or the strings or docstrings of a module."""
    source = file.read_text()
    if file.suffix != ".py":
        return [re.sub(r"(?ms)^```.*?^```|`[^`]*`", "CODE", source)]
    nodes = list(ast.walk(ast.parse(source)))
    if file in STRINGS:
        found = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        joined = [part for node in nodes if isinstance(node, ast.JoinedStr) for part in [message(node)]]
        return [*found, *joined]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def message(node: ast.JoinedStr) -> str:
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def phrases_in(text: str) -> list[str]:
    plain = " ".join(text.split())
    return [
        f"{plain[max(0, found.start() - 40) : found.end() + 20]!r}: {instead}"
        for phrase, instead in PHRASES.items()
        for found in re.finditer(phrase, plain, re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", FILES)
def test_no_phrase_comes_back(name):
    found = [line for text in texts(ROOT / name) for line in phrases_in(text)]
    assert found == []


@pytest.mark.parametrize(
    "sentence",
    [
        "the folder is no run",
        "compile for a GPU that is\nnot here",
        "UserError: nobody knows how much it is.",
        "tables are passed over; a line says so",
        "A running run takes more.",
        "a PyTorch twin that agrees with it",
    ],
)
def test_each_kind_of_phrase_is_found(sentence):
    assert phrases_in(sentence)


@pytest.mark.parametrize(
    "sentence",
    ["there is no such file", "it is no longer there", "a step takes more than a second", "it is not a run folder"],
)
def test_plain_english_passes(sentence):
    assert phrases_in(sentence) == []
