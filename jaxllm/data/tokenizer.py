"""The tokenizer of a run: loaded by name, or a byte-level BPE trained on the data; aligned with the model's config."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from jaxllm.config import ModelConfig, RunConfig
from jaxllm.config.groups import JOINED_TEXTS, DataConfig
from jaxllm.data.chats import Chat, Pair
from jaxllm.data.encode import encoder_of
from jaxllm.data.hub_retry import hub_reachable
from jaxllm.data.rank_file import load_ranks
from jaxllm.data.sentencepiece_file import MODEL_FILE, check_same
from jaxllm.data.source import Source
from jaxllm.data.tokenizer_files import MAX_TOKENIZER_BYTES, RANKS, is_there, tokenizer_class
from jaxllm.data.tokenizer_trials import TRIALS
from jaxllm.errors import UserError, as_user_error, listed, one_line, shown
from jaxllm.files import StrPath, cache_file, check_file, plain_path, read_json, write_json, write_text_atomically
from jaxllm.model.batch import IGNORED, token_batch

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Config = TypeVar("Config", bound=RunConfig)

END_OF_TEXT = "<|endoftext|>"

PAD = "<|pad|>"
"""Differs from the end of a text: clients leave padding out of the loss, and would leave out the ends, too."""

TRAINING_CHARS = 20_000_000
"""Number of characters that a tokenizer is trained on: with more, merges change little and memory grows."""


OF_TRANSFORMERS_5 = ("backend", "is_local", "local_files_only")
"""Entries of transformers 5 in tokenizer_config.json about the place where it saved. transformers 4 does not know
them, nor TokenizersBackend, the present name of the class PreTrainedTokenizerFast."""

CACHE_FORMAT = 2
"""Increase it when `train_tokenizer` gives another result for the same text."""


MAX_GROWTH = 64
"""Limit of how much all replacements together lengthen a text; known tokenizers replace one letter by one."""

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

ELSEWHERE = ("fast_tokenizer_files", "gguf_file", "init_inputs", "tokenizer_object", "vocab", "merges")
"""Keys of tokenizer_config.json by which transformers takes a tokenizer from another file, or from the key itself."""


def load_tokenizer(name: StrPath) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub. Raises a UserError if there is none, or the Hub cannot be reached."""
    name = os.fspath(name)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()  # else it advises installing PyTorch
    path, kind = Path(name).expanduser(), ""
    if path.exists():
        kind = tokenizer_class(path)
        check_tokenizer_files(path)
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"tokenizer is {name!r}: there is no such folder, and it is not a Hub name (OWNER/NAME)")
    cached_only = not path.exists() and not hub_reachable()

    def failed(error: Exception) -> str:
        mend = "check its files" if path.exists() else "check the name and the network, or pass --tokenizer FOLDER"
        reason = "the Hugging Face Hub could not be reached" if cached_only else one_line(error)
        return f"tokenizer is {name!r}: it could not be loaded ({reason}): {mend}"

    with as_user_error(failed), panics_as_errors():
        if path.exists():  # not by AutoTokenizer: it would offer to run the code of an exported folder
            with plain_path(path) as plain:
                own = load_ranks if kind == RANKS else getattr(transformers, kind).from_pretrained
                tokenizer = own(plain)
                if not is_there(plain / "tokenizer.json") and is_there(plain / MODEL_FILE):
                    check_same(plain, tokenizer)
        else:
            from transformers import AutoTokenizer  # here: where PyTorch is installed, its import takes seconds

            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=cached_only, trust_remote_code=False)
        _try_out(tokenizer)
        return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer works before the data is read, since a broken one may still load."""
    ids = tokenizer(TRIALS[0], add_special_tokens=False)["input_ids"]
    if not isinstance(tokenizer.decode(ids), str) or len(tokenizer) < 1:
        raise ValueError("it does not decode tokens to text")
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if not all(isinstance(token, int) for token in (*ids, *special) if token is not None):
        raise ValueError("its token ids are not integers")


def check_tokenizer_files(folder: Path) -> None:
    """Raise a UserError for files that refer to other files, lengthen a text far too much, or hold no JSON object."""
    contents = {name: read_json(folder / name, MAX_TOKENIZER_BYTES) for name in FILES if is_there(folder / name)}
    for file in sorted((*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja"))):
        check_file(file, MAX_TOKENIZER_BYTES)
    if found := [key for key in ELSEWHERE if contents.get("tokenizer_config.json", {}).get(key)]:
        raise UserError(f"{folder / 'tokenizer_config.json'} has {listed(found)}: leave it to tokenizer.json")
    steps = [contents.get("tokenizer.json", {}).get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    try:
        growth = _growth(steps)
    except RecursionError:
        raise UserError(f"{folder / 'tokenizer.json'} is nested too deeply: it is not a tokenizer") from None
    if growth > MAX_GROWTH:
        raise UserError(
            f"{folder / 'tokenizer.json'} makes a text up to {shown(growth)} times as long: it is not a tokenizer"
        )


def _growth(part: Any) -> int:
    """The factor by which the steps of a tokenizer.json, one after another, can lengthen a text."""
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
    """Turn a panic of a Rust library into an `Exception`: in Python it is only a `BaseException`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the library panicked: {error}") from None


def train_tokenizer(source: Source, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on the training part of a source; every byte has a token, so any text round-trips.

    Raises:
        UserError: the vocabulary has no room for all bytes.
    """
    return _train(_training_texts(source), vocab_size)


def train_or_recall_tokenizer(source: Source, vocab_size: int, data: str) -> PreTrainedTokenizerBase:
    """`train_tokenizer`, cached by the text; `data` names the source in messages."""
    import tokenizers

    texts = list(_training_texts(source))
    key = hashlib.sha256(f"{CACHE_FORMAT} {tokenizers.__version__} {vocab_size}".encode())
    for text in texts:
        encoded = text.encode("utf-8")
        key.update(len(encoded).to_bytes(8))
        key.update(encoded)
    file = cache_file("tokenizers", f"{key.hexdigest()}.json")
    if file is not None and file.is_file():
        with contextlib.suppress(Exception):  # a damaged file may raise anything; it is written again
            return _wrap(tokenizers.Tokenizer.from_file(str(file)))
    print(f"Training a tokenizer of {vocab_size} tokens on {data} ...")
    tokenizer: Any = _train(texts, vocab_size)
    if file is not None:
        with contextlib.suppress(OSError):  # a full disk: the run has its tokenizer anyway
            write_text_atomically(file, tokenizer.backend_tokenizer.to_str())
    return tokenizer


def _train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise UserError(f"vocab_size is {vocab_size}: a byte-level tokenizer needs at least 258, or pass --tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([PAD])  # gets the last id
    return _wrap(bpe)


def _wrap(bpe: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _training_texts(source: Source) -> Iterator[str]:
    chars = 0
    for chunk in source.chunks():
        parts = chunk.text if isinstance(chunk.text, Pair) else [chunk.text]
        text = "".join(part for part in parts if isinstance(part, str))
        if not all(isinstance(part, str) for part in parts):
            raise UserError("data: its rows are chats: pass a --tokenizer that has a chat template, or --text-field")
        if not chunk.held_out:
            yield text
            chars += len(text)
            if chars > TRAINING_CHARS:
                return


def without_dropout(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Turn off a BPE's dropout, with which the same text is encoded differently each time, and print that."""
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        model.dropout = None
        print(f"Tokenizer: its BPE dropout of {dropout:g} is off: a run encodes the same text in the same way")
    return tokenizer


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of rows that a model's embeddings need for it."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def with_pad_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> PreTrainedTokenizerBase:
    """Add the pad token that a tokenizer lacks, if the model has a row for it; without `vocab_size` it will get one."""
    if tokenizer.pad_token_id is None and (vocab_size is None or _size(tokenizer) < vocab_size):
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def align(config: Config, tokenizer: PreTrainedTokenizerBase) -> Config:
    """Set the config's special tokens to the tokenizer's, and its vocabulary size where the preset leaves it open.

    Raises:
        UserError: the tokenizer has tokens for which the model has no row.
    """
    model, size = config.model, _size(tokenizer)
    vocab_size = config.given_vocab_size or size
    if size > vocab_size:
        remedy = f"pass --model.vocab-size {size} or another --tokenizer"
        if getattr(config, "init", None) is not None or (config.folder / "checkpoints").is_dir():
            remedy = "pass the --tokenizer that belongs to the weights"  # which have a fixed number of rows
        raise UserError(f"vocab_size is {vocab_size}, but the tokenizer has {size} tokens: {remedy}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, which separates documents: pass another")
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    special: dict[str, Any] = {}  # trained weights keep theirs if the tokenizer ends texts with one of them
    if eos not in model.eos_token_ids:
        new_pad = eos if pad is None else pad
        special = {
            "bos_token_id": eos if bos is None else bos,
            "eos_token_id": eos,
            "pad_token_id": model.pad_token_id if model.eos_token_ids else new_pad,
        }
    return config.with_options(model=dataclasses.replace(model, vocab_size=vocab_size, **special))


def export_tokenizer(tokenizer: PreTrainedTokenizerBase, model: ModelConfig, out: Path) -> None:
    """Save a tokenizer for a model's clients: with the model's length and pad token, and encoding as in training.

    Training encodes without the special tokens that a template would add. Padding is on the left, for generation.
    """
    made: Any = copy.deepcopy(tokenizer)
    if made.num_special_tokens_to_add():
        made.backend_tokenizer.post_processor = None
        made.init_kwargs |= {"add_bos_token": False, "add_eos_token": False}
    if made.pad_token_id is None:
        pad = model.pad_token_id
        made.pad_token = made.eos_token if pad is None else made.convert_ids_to_tokens(pad)
    made.model_max_length = model.max_position_embeddings
    made.padding_side = made.init_kwargs["padding_side"] = "left"
    save_tokenizer(made, out)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer into a folder of any name, which exists. Raises OSError if the disk refuses."""
    try:
        with plain_path(folder) as plain:
            tokenizer.save_pretrained(str(plain))
        file = folder / "tokenizer_config.json"
        saved = {name: value for name, value in read_json(file).items() if name not in OF_TRANSFORMERS_5}
        if saved.get("tokenizer_class") == "TokenizersBackend":
            saved["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(file, saved)
    except Exception as error:  # tokenizers passes on the system's error as text
        if not (code := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None


def bytes_per_target(tokenizer: PreTrainedTokenizerBase, rows: np.ndarray, data: DataConfig = JOINED_TEXTS) -> float:
    """UTF-8 bytes of text for each target of rows (n,T) of `jaxllm.model.batch`. Special tokens do not count as text.

    A loss in nats per token, divided by this and by ln 2, is in bits per byte, which different tokenizers share.
    """
    if data.has_targets:
        targets = token_batch(rows, data).labels[:, 1:]
        targets = targets[targets != IGNORED]
        return text_bytes(tokenizer, targets[None]) / targets.size if targets.size else 0.0
    return (text_bytes(tokenizer, rows) - text_bytes(tokenizer, rows[:, :1])) / rows[:, 1:].size


def text_bytes(tokenizer: PreTrainedTokenizerBase, rows: np.ndarray) -> int:
    """UTF-8 bytes of the text of rows (n,T); of a character that the end of a row cuts, those of its tokens there."""
    special, backend = set(tokenizer.all_special_ids), getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in str(backend.decoder):
        special |= {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        from tokenizers import pre_tokenizers

        letters = {*pre_tokenizers.ByteLevel.alphabet()}  # one for each byte
        counts = np.bincount(rows.reshape(-1))
        pieces = {int(id): str(tokenizer.convert_ids_to_tokens(int(id))) for id in np.flatnonzero(counts)}
        sizes = {
            id: len(piece) if letters.issuperset(piece) else len(piece.encode("utf-8")) for id, piece in pieces.items()
        }
        return sum(int(counts[id]) * size for id, size in sizes.items() if id not in special)
    vocabulary = tokenizer.get_vocab()
    single = [vocabulary[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in vocabulary]
    if len(single) == 256:  # any byte is one byte, and `A` can always be decoded
        rows = np.where(np.isin(rows, single), vocabulary["<0x41>"], rows)
    texts = tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(len(text.encode("utf-8")) for text in texts)


def decode_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that new tokens add to a prompt. Both are decoded together: some decoders strip a leading space."""
    before, whole = str(tokenizer.decode([*prompt])), str(tokenizer.decode([*prompt, *new]))
    # a prompt may end within a character
    return whole.removeprefix(before) if whole.startswith(before) else str(tokenizer.decode([*new]))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, special_tokens: str = "text", as_chat: bool = False
) -> list[int]:
    """Token ids of a prompt; of an empty one, the token that separates documents.

    `special_tokens` is the run's `special_tokens_in_text`. `as_chat`: the prompt is what a user says, through the chat
    template.

    Raises:
        UserError: the tokenizer cannot encode the text, or has no token for an empty one.
    """
    refused = f"prompt is {shown(prompt)}: the tokenizer cannot encode it"
    with as_user_error(lambda error: f"{refused} ({one_line(error)})"), panics_as_errors():
        encoder = encoder_of(tokenizer, special_tokens)
        said: Chat = [{"role": "user", "content": prompt}]
        ids = (encoder.chat_ids(said, add_generation_prompt=True) if as_chat else encoder.ids(prompt)).tolist()
    end: Any = tokenizer.eos_token_id
    if not ids and end is None:
        raise UserError("prompt is empty, and the tokenizer has no end-of-sequence token to start from: pass a prompt")
    return ids or [end]
