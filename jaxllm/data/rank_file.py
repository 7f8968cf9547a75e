"""Tokenizers that come as a file of ranks, `tiktoken.model`, and code: read without running the code.

The file has a line for each token, its bytes in base 64 and its rank. The split of a text into words and the tokens
after the ranks are in the code; for the classes known here they are kept as a table.
"""

from __future__ import annotations

import ast
import base64
import binascii
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxllm.errors import UserError, listed, shown
from jaxllm.files import read_bounded, read_json, write_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

RANK_FILE = "tiktoken.model"

MAX_BYTES = 64 * 2**20
"""Largest file of ranks, and largest code: 163,584 ranks take 3 MB."""


class RankClass(NamedTuple):
    """What the code of a class says."""

    split: tuple[str, ...]
    """Alternatives of the expression whose matches are the words of a text."""
    added: int
    """Tokens after the ranks: those of `added_tokens_decoder`, and others that no text spells."""


_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

RANK_CLASSES = {
    "TikTokenTokenizer": RankClass(
        (
            r"[\p{Han}]+",
            f"{_LETTERS}{_UPPER}*{_LOWER}+{_ENDING}",
            f"{_LETTERS}{_UPPER}+{_LOWER}*{_ENDING}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ),
        256,
    )
}
"""By `tokenizer_class` in tokenizer_config.json: `model_type` does not tell Moonlight from DeepSeek-V3, and is not in a
tokenizer's folder. TikTokenTokenizer is that of Moonlight and the Kimi line, whose split is o200k's with Han characters
apart from letters and without `/` after punctuation."""


def check_ranks(folder: Path) -> None:
    """Raise a UserError, without the folder and the remedy, unless a folder's file of ranks belongs to a class whose
    split is known, and its code says the same."""
    file = folder / "tokenizer_config.json"
    kind = read_json(file, MAX_BYTES).get("tokenizer_class") if file.exists() else None
    if not isinstance(kind, str) or kind not in RANK_CLASSES:
        raise UserError(
            f"{RANK_FILE} is read with tokenizer_class {' or '.join(RANK_CLASSES)} in tokenizer_config.json, and it is "
            f"{shown(kind)}"
        )
    code = sorted(folder.glob("tokenization_*.py"))
    said = [text for path in code for text in _texts(path)]
    if code and not all(any(part in text for text in said) for part in RANK_CLASSES[kind].split):
        raise UserError(
            f"{listed(path.name for path in code)} splits text differently from the {kind} that is read here"
        )


def _texts(path: Path) -> Iterator[str]:
    """The text constants of Python code."""
    try:
        tree = ast.parse(read_bounded(path, MAX_BYTES))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{path.name} is not valid Python: it states how the tokenizer splits text") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def load_ranks(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that `check_ranks` accepts. The folder's path is one that transformers takes.

    Raises:
        UserError: the ranks or the added tokens are not those of such a tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    config = read_json(folder / "tokenizer_config.json", MAX_BYTES)
    tokenizer = _tokenizer(read_ranks(folder / RANK_FILE), config, folder)
    with tempfile.TemporaryDirectory(prefix="jaxllm-") as scratch:
        for file in folder.iterdir():  # special tokens and chat templates: transformers finds them
            if file.suffix != ".py" and file.name not in (RANK_FILE, "tokenizer_config.json", "config.json"):
                os.symlink(file.resolve(), Path(scratch, file.name))
        tokenizer.save(str(Path(scratch, "tokenizer.json")), pretty=False)
        named = ("auto_map", "tokenizer_class", "added_tokens_decoder")
        write_json(Path(scratch, "tokenizer_config.json"), {k: v for k, v in config.items() if k not in named})
        return PreTrainedTokenizerFast.from_pretrained(scratch)


def read_ranks(file: Path) -> dict[bytes, int]:
    """The bytes of each token and its rank, by rank.

    Raises:
        UserError: the ranks are not 0, 1, 2, ..., or a byte has none.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bounded(file, MAX_BYTES).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{file}, line {number}: a token in base 64 and its rank are expected") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{file}: the ranks must be 0, 1, 2, ... of tokens that differ: copy the file again")
    if missing := [value for value in range(256) if bytes([value]) not in ranks]:
        raise UserError(f"{file}: the bytes {listed(map(hex, missing), most=3)} have no rank: copy the file again")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _tokenizer(ranks: Mapping[bytes, int], config: Mapping[str, Any], folder: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    known = RANK_CLASSES[config["tokenizer_class"]]
    letters = bytes_to_unicode()  # that stand for bytes in a byte-level vocabulary
    written = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    bpe = models.BPE({written[token]: rank for token, rank in ranks.items()}, list(_merges(ranks, written)))
    bpe.ignore_merges = True  # a word that has a rank is one token
    tokenizer = Tokenizer(bpe)
    split = pre_tokenizers.Split(Regex("|".join(known.split)), "isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    added = _added(config, len(ranks), known.added, folder)
    taken = Counter((*written.values(), *(token.content for token in added.values())))
    if twice := [content for content, count in taken.items() if count > 1]:
        raise UserError(f"{folder / 'tokenizer_config.json'}: {listed(twice, most=3)} has two ids")
    tokenizer.add_tokens([added[id] for id in sorted(added)])
    return tokenizer


def _merges(ranks: Mapping[bytes, int], written: Mapping[bytes, str]) -> Iterator[tuple[str, str]]:
    """Pairs that are joined, first those whose result has the lowest rank."""
    for token in ranks:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        for left, right in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            yield written[left], written[right]


def _added(config: Mapping[str, Any], first: int, count: int, folder: Path) -> dict[int, AddedToken]:
    """The tokens after the ranks, by id."""
    from tokenizers import AddedToken

    what, named = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder", config.get("added_tokens_decoder")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{what} is {shown(named)}: it must name the special tokens by their ids")
    added = {id: AddedToken(f"<|reserved_token_{id}|>", special=True) for id in range(first, first + count)}
    for key, entry in named.items():
        id = int(key) if key.isdecimal() else -1
        content = entry.get("content") if isinstance(entry, dict) else None
        if id not in added or not isinstance(content, str) or not content:
            raise UserError(
                f"{what} has {shown(content)} as {key}: with {first} ranks in {RANK_FILE}, ids are {first} to "
                f"{first + count - 1}"
            )
        flags = {flag: bool(entry.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "special")}
        added[id] = AddedToken(content, normalized=False, **flags)
    return added
