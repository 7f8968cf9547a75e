"""The rows that a run is evaluated on, which its folder keeps. Imports neither JAX nor PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxllm.config.groups import DataConfig
from jaxllm.data.held_out import HeldOut
from jaxllm.data.report import Counts
from jaxllm.data.source import Source
from jaxllm.errors import UserError
from jaxllm.files import check_file, sha256_of
from jaxllm.model.batch import are_rows
from jaxllm.store.folder import TOKENIZER

FILE = "held_out.safetensors"
"""In a run's folder."""

MAX_BYTES = 2**32

FORMAT = 1
"""Increase it when the same text gives other rows."""


class HeldOutFile:
    """The file of the rows that a run is evaluated on; without it, the next start makes them again."""

    def __init__(self, run: Path, source: Source, data: DataConfig, samples: int, streams: int):
        self._file, self._source, self._data = run / FILE, source, data
        self._samples, self._streams = samples, streams

    def read(self, vocab_size: int) -> HeldOut | None:
        """The rows; None if the file is missing or damaged, or was made of other text or in another way."""
        with contextlib.suppress(UserError, OSError, SafetensorError, ValueError, KeyError, TypeError):
            check_file(self._file, MAX_BYTES)
            with safe_open(self._file, "numpy") as file:
                rows, facts = file.get_tensor("rows"), json.loads((file.metadata() or {})["facts"])
            fits = rows.ndim == 2 and rows.shape[1] == self._data.seq_len and len(rows) > 0
            if fits and facts["key"] == self._key() and are_rows(rows, vocab_size):
                return HeldOut(rows, [Counts(**seen) for seen in facts["seen"]], Counts(**facts["encoded"]))
        return None

    def write(self, held_out: HeldOut) -> None:
        """Write the rows, if the disk takes them; the run's folder has its tokenizer."""
        encoded, seen = dataclasses.asdict(held_out.encoded), [dataclasses.asdict(each) for each in held_out.seen]
        facts = {"key": self._key(), "seen": seen, "encoded": encoded}
        with contextlib.suppress(OSError):
            part = self._file.with_name(f".{FILE}")
            save_file({"rows": np.ascontiguousarray(held_out.rows)}, part, {"facts": json.dumps(facts)})
            part.replace(self._file)

    def _key(self) -> str:
        """What decides the rows: the content of the text, how it is read and encoded, and how many there are."""
        options = dataclasses.asdict(self._data) | {"source": None, "eval_data": None}  # both by their content
        evaluated = [evaluation.open().revision for evaluation in self._source.evaluations]
        files = sorted(file for file in (self._file.parent / TOKENIZER).rglob("*") if file.is_file())
        tokenizer = [[file.name, sha256_of(file)] for file in files]
        decisive = [FORMAT, options, evaluated, tokenizer, self._samples, self._streams]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
