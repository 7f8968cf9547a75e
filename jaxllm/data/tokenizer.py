"""The tokenizer of a run: loaded by name, or a byte-level BPE trained on the data; aligned with the model's config."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.atomic import write_text_atomically
from jaxllm.cache import cache_folder
from jaxllm.config import PRESETS, TOKENIZER_SIZED_PRESETS, TrainConfig
from jaxllm.data.corpus import Source, hub_reachable, one_line
from jaxllm.data.tokenizer_files import check_tokenizer_files, panics_as_errors
from jaxllm.errors import UserError
from jaxllm.shown import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"

TRAINING_CHARS = 20_000_000
"""As much text as a tokenizer is trained on: beyond it merges change little, and memory grows."""


TRIAL = "def f(x):\n    return 'Hello, wörld 😀' + str(0)\t\n"
"""A text that each tokenizer takes; what does not take it is broken."""

CACHE_FORMAT = 1
"""To be raised when `train_tokenizer` makes something else of the same text."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        UserError: there is none, or the Hub cannot be reached.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would advise installing PyTorch
    path = Path(name).expanduser()
    if path.exists():
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"tokenizer is {name!r}: the folder holds no tokenizer.json")
        check_tokenizer_files(path)
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"tokenizer is {name!r}: there is no such folder, and it is no Hub name (OWNER/NAME)")
    cached_only = not path.exists() and not hub_reachable()
    try:
        with panics_as_errors():
            if path.exists():  # not by AutoTokenizer: it would offer to run the code of an exported folder
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
            else:
                from transformers import AutoTokenizer  # here: where PyTorch is installed, its import takes seconds

                tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=cached_only, trust_remote_code=False)
            _try_out(tokenizer)
            return tokenizer
    except Exception as error:  # transformers, tokenizers and the Hub's client raise kinds of their own
        mend = "check its files" if path.exists() else "check the name and the network, or pass --tokenizer FOLDER"
        reason = "the Hugging Face Hub could not be reached" if cached_only else one_line(error)
        raise UserError(f"tokenizer is {name!r}: it could not be loaded ({reason}): {mend}") from None


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that loads may still be none: better said here than in the middle of the data."""
    ids = tokenizer(TRIAL, add_special_tokens=False)["input_ids"]
    if not isinstance(tokenizer.decode(ids), str) or len(tokenizer) < 1:
        raise ValueError("it makes no text of tokens")
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if not all(isinstance(token, int) for token in (*ids, *special) if token is not None):
        raise ValueError("its tokens are no numbers")


def train_tokenizer(source: Source, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on the training part of a source; every byte has a token, so any text round-trips.

    Raises:
        UserError: the vocabulary has no room for all bytes.
    """
    return _train(_training_texts(source), vocab_size)


def train_or_recall_tokenizer(source: Source, vocab_size: int, data: str) -> PreTrainedTokenizerBase:
    """`train_tokenizer`, or what it once made of the very same text; `data` is how the source is called."""
    import tokenizers

    texts = list(_training_texts(source))
    key = hashlib.sha256(f"{CACHE_FORMAT} {tokenizers.__version__} {vocab_size}".encode())
    for text in texts:
        encoded = text.encode("utf-8")
        key.update(len(encoded).to_bytes(8))
        key.update(encoded)
    try:
        file = cache_folder("tokenizers") / f"{key.hexdigest()}.json"
    except (OSError, RuntimeError):  # nowhere to write, no home: it is trained each time
        file = None
    if file is not None and file.is_file():
        with contextlib.suppress(Exception):  # what a damaged file raises; it is made anew
            return _wrap(tokenizers.Tokenizer.from_file(str(file)))
    print(f"Training a tokenizer of {vocab_size} tokens on {data} ...")
    tokenizer = _train(texts, vocab_size)
    if file is not None:
        with contextlib.suppress(OSError):  # a full disk: the run has its tokenizer all the same
            write_text_atomically(file, tokenizer.backend_tokenizer.to_str())
    return tokenizer


def _train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size is {vocab_size}: a byte-level tokenizer needs at least 257, or pass --tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _wrap(bpe)


def _wrap(bpe: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _training_texts(source: Source) -> Iterator[str]:
    chars = 0
    for piece in source.pieces():
        if not piece.held_out:
            yield piece.text
            chars += len(piece.text)
            if chars > TRAINING_CHARS:
                return


def align(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainConfig:
    """Give the model's config the tokenizer's special tokens, and a tokenizer-sized preset its vocabulary.

    Raises:
        UserError: the tokenizer has tokens for which the model has no row.
    """
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    model = config.model
    if config.preset in TOKENIZER_SIZED_PRESETS and model.vocab_size == PRESETS[config.preset].vocab_size:
        vocab_size = size
    else:
        vocab_size = model.vocab_size
    if size > vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size}, but the tokenizer has {size} tokens: "
            f"pass --model.vocab-size {size} or another --tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, which separates documents: pass another")
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    special = {
        "bos_token_id": eos if bos is None else bos,
        "eos_token_id": eos,
        "pad_token_id": eos if pad is None else pad,
    }
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=vocab_size, **special))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one is the token that separates documents.

    Raises:
        UserError: the tokenizer takes no such text, or has no token for an empty one.
    """
    try:
        with panics_as_errors():
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"prompt is {shown(prompt)}: the tokenizer does not take it ({one_line(error)})") from None
    if None in ids:
        raise UserError("prompt is empty, and the tokenizer has no end-of-sequence token to start from: pass a prompt")
    return ids
