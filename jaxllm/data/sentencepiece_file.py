"""Tokenizers that come as a SentencePiece model, `tokenizer.model`: read by transformers, compared with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxllm.data.tokenizer_trials import TRIALS, tried_ids
from jaxllm.errors import UserError, as_user_error, listed, one_line, shown
from jaxllm.files import check_file, read_json
from jaxllm.packages import is_installed

MODEL_FILE = "tokenizer.model"

MAX_BYTES = 64 * 2**20

CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes whose ids are those of the model; others move them."""


def check_model(folder: Path) -> None:
    """Raise a UserError, without the folder and the remedy, if a folder's tokenizer.model cannot be read."""
    config = folder / "tokenizer_config.json"
    named = read_json(config, MAX_BYTES).get("tokenizer_class") if config.exists() else None
    if named not in CLASSES:
        raise UserError(
            f"{MODEL_FILE} is read with tokenizer_class {' or '.join(CLASSES)} in tokenizer_config.json, and it is "
            f"{shown(named)}"
        )
    check_file(folder / MODEL_FILE, MAX_BYTES)
    if missing := [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]:
        raise UserError(f"{MODEL_FILE} is read with {listed(missing)}: pip install sentencepiece protobuf")


def _is_installed(name: str) -> bool:
    try:
        return is_installed(name)
    except ModuleNotFoundError:  # its parent is not
        return False


def check_same(folder: Path, tokenizer: Any) -> None:
    """Raise a UserError unless a tokenizer that transformers made of a folder's model encodes as SentencePiece does."""
    from sentencepiece import SentencePieceProcessor  # pyright: ignore[reportMissingImports]

    file = folder / MODEL_FILE
    with as_user_error(lambda error: f"{file} is not a SentencePiece model ({one_line(error)})"):
        theirs: Any = SentencePieceProcessor(model_file=str(file))
    pieces = [theirs.decode([id]) for id in tried_ids(theirs.get_piece_size()) if not theirs.is_control(id)]
    special = [text for text in tokenizer.get_added_vocab() if text]
    for text in (*TRIALS, *pieces):
        if any(added in text for added in special):  # which the library takes for text
            continue
        if tokenizer(text, add_special_tokens=False)["input_ids"] != theirs.encode(text):
            raise UserError(
                f"{file}: this release of transformers encodes {shown(text)} differently from "
                "SentencePiece: put a tokenizer.json of the same tokens into the folder, or train with --tokenizer "
                "FOLDER"
            )
