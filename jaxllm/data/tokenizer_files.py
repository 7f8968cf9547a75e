"""The files of a tokenizer: which those are, and which kinds of them are read."""

from fnmatch import fnmatch
from pathlib import Path

from jaxllm.data.rank_file import RANK_FILE, check_ranks
from jaxllm.data.sentencepiece_file import MODEL_FILE, check_model
from jaxllm.errors import UserError, listed, shown
from jaxllm.files import check_file, read_json

VOCABULARIES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "*.model", "*.model.v*", "*.tiktoken",
)  # fmt: skip
"""One of them, or two, is the vocabulary."""

TOKENIZER_FILES = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "*.jinja", "additional_chat_templates/*.jinja", "tokenization_*.py",
)  # fmt: skip

MAX_TOKENIZER_BYTES = 64 * 2**20
"""Largest tokenizer.json: a vocabulary of 250,000 tokens takes 20 MB."""

BYTE_LEVEL = ("GPT2Tokenizer", "Qwen2Tokenizer")
"""Classes of transformers whose tokenizers are wholly described by vocab.json, merges.txt and the class."""


def is_tokenizer_file(name: str) -> bool:
    """Whether a file, by its path in a model's folder, belongs to the tokenizer."""
    return any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


RANKS = "ranks"
"""In place of a class: a file of ranks, which this project reads."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of a kind that is read."""
    try:
        tokenizer_class(folder)
    except UserError:
        return False
    return True


def tokenizer_class(folder: Path) -> str:
    """The class of transformers that reads a folder's tokenizer without running code of the folder, or RANKS.

    Raises:
        UserError: the folder has no tokenizer, or one of a kind that is not read.
    """
    if is_there(folder / "tokenizer.json"):
        return "PreTrainedTokenizerFast"
    what, remedy = (
        f"tokenizer is {str(folder)!r}",
        "train with --tokenizer FOLDER, one with a tokenizer.json of the same tokens, or put that file into the folder",
    )
    held = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in held if any(fnmatch(name, pattern) for pattern in VOCABULARIES)]
    if not found:
        raise UserError(f"{what}: the folder holds no tokenizer.json: {remedy}")
    if found in ([RANK_FILE], [MODEL_FILE]):
        try:
            (check_ranks if found == [RANK_FILE] else check_model)(folder)
        except UserError as error:
            raise UserError(f"{what}: {error}; {remedy}") from None
        return RANKS if found == [RANK_FILE] else "PreTrainedTokenizerFast"
    if found != ["merges.txt", "vocab.json"]:
        raise UserError(f"{what}: {listed(found)} is of a kind that is not read: {remedy}")
    config = folder / "tokenizer_config.json"
    named = read_json(config, MAX_TOKENIZER_BYTES).get("tokenizer_class") if is_there(config) else None
    known = named.removesuffix("Fast") if isinstance(named, str) else None
    if known not in BYTE_LEVEL:
        raise UserError(
            f"{what}: tokenizer_class is {shown(named)} in tokenizer_config.json: with vocab.json and merges.txt it "
            f"must be {' or '.join(BYTE_LEVEL)}; {remedy}"
        )
    read_json(folder / "vocab.json", MAX_TOKENIZER_BYTES)
    check_file(folder / "merges.txt", MAX_TOKENIZER_BYTES)
    return known


def is_there(file: Path) -> bool:
    """Whether the path exists, also as a broken link; only a regular file is then read."""
    return file.exists() or file.is_symlink()
