"""Whether transformers encodes with a tokenizer's files as a run does."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.data.tokenizer import panics_as_errors
from jaxllm.data.tokenizer_files import (
    MAX_TOKENIZER_BYTES,
    RANKS,
    VOCABULARIES,
    is_there,
    is_tokenizer_file,
    tokenizer_class,
)
from jaxllm.data.tokenizer_trials import TRIALS, tried_ids
from jaxllm.errors import UserError, one_line, shown
from jaxllm.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that are wholly described by tokenizer.json."""


def check_tokenizer_class(folder: Path, tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any]) -> None:
    """Check that AutoTokenizer encodes with a folder's files as a run does that trains on `tokenizer`, read of them.

    transformers may take parts of a tokenizer from the class that tokenizer_config.json names, or that belongs to the
    model, and not from its vocabulary. Where that class is code of the folder, it is not run, which is reported.

    Args:
        model: the config.json that the export has beside the files.

    Raises:
        UserError: it encodes differently.
    """
    config = folder / "tokenizer_config.json"
    values = read_json(config, MAX_TOKENIZER_BYTES) if is_there(config) else {}
    if values.get("tokenizer_class") in PLAIN_CLASSES and not values.get("auto_map"):
        return
    if tokenizer_class(folder) == RANKS:
        print(
            f"{config}: {shown(values['tokenizer_class'])} is code of the folder, which is not run: its split is known"
        )
        return
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory() as scratch, panics_as_errors():
            for file in folder.iterdir():
                if is_tokenizer_file(file.name):
                    Path(scratch, file.name).symlink_to(file.resolve())
            write_json(Path(scratch, "config.json"), model)
            other = AutoTokenizer.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
            pieces = tokenizer.convert_ids_to_tokens([*tried_ids(len(tokenizer))])
            own = [tokenizer.convert_tokens_to_string([piece]) for piece in pieces if isinstance(piece, str)]
            same = all(
                tokenizer(text, add_special_tokens=False)["input_ids"]
                == other(text, add_special_tokens=False)["input_ids"]
                for text in (*TRIALS, *own)
            )
    except Exception as error:  # of whatever the class does
        named = shown(values.get("tokenizer_class") or values.get("auto_map"))
        print(f"{config}: {named} was not compared with the vocabulary, as it does not load ({one_line(error)})")
        return
    if not same:
        vocabulary = next(name for name in VOCABULARIES if any(folder.glob(name)))
        raise UserError(
            f"{config}: tokenizer_class is {shown(values.get('tokenizer_class'))}: AutoTokenizer would use "
            f"{type(other).__name__}, which encodes differently from {vocabulary}, which a run uses: set it to "
            f"{PLAIN_CLASSES[0]} to train with {vocabulary}, or write tokenizer.json with that class's save_pretrained"
        )
