"""A tokenizer's folder may come from anywhere: what its files may say, before a library that believes them reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxllm.bounded import check_file
from jaxllm.config import read_json
from jaxllm.errors import UserError
from jaxllm.shown import listed, shown

MAX_TOKENIZER_BYTES = 64 * 2**20
"""Of tokenizer.json: a vocabulary of 250,000 tokens takes 20 MB."""

MAX_GROWTH = 64
"""How much longer a text may get by all replacements together; known tokenizers replace one letter by one."""

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

ELSEWHERE = ("fast_tokenizer_files", "gguf_file", "init_inputs", "tokenizer_object", "vocab", "merges")
"""Keys of tokenizer_config.json by which transformers takes a tokenizer from another file, or from the key itself."""


def check_tokenizer_files(folder: Path) -> None:
    """Refuse files that lead elsewhere, or that make far more of a text than it is.

    Raises:
        UserError: one does, or is no JSON object.
    """
    contents = {name: read_json(folder / name, MAX_TOKENIZER_BYTES) for name in FILES if _is_there(folder / name)}
    for file in sorted((*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja"))):
        check_file(file, MAX_TOKENIZER_BYTES)
    if found := [key for key in ELSEWHERE if contents.get("tokenizer_config.json", {}).get(key)]:
        raise UserError(f"{folder / 'tokenizer_config.json'} has {listed(found)}: leave it to tokenizer.json")
    steps = [contents["tokenizer.json"].get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    try:
        growth = _growth(steps)
    except RecursionError:
        raise UserError(f"{folder / 'tokenizer.json'} is nested too deeply: it is no tokenizer") from None
    if growth > MAX_GROWTH:
        raise UserError(f"{folder / 'tokenizer.json'} replaces letters by {shown(growth)} others: it is no tokenizer")


def _is_there(file: Path) -> bool:
    """Also what is no file, and is refused by whoever reads it."""
    return file.exists() or file.is_symlink()


def _growth(part: Any) -> int:
    """By how much the steps of a tokenizer.json can lengthen a text, one after another."""
    growth = 1
    if isinstance(part, dict):
        for key in ("content", "prepend", "replacement"):
            if isinstance(part.get(key), str):
                growth *= max(1, len(part[key]))
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        growth *= _growth(inner)
    return growth


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """A panic of a library in Rust is no `Exception` in Python, but ends the work like one."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the library panicked: {error}") from None
