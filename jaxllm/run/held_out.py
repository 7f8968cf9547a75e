"""The rows that a run is evaluated on, which its folder keeps; and the report of its data, which reading them gives."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxllm.config import RunConfig
from jaxllm.data.mixture import Mixture
from jaxllm.data.report import Seen, TextCounts, make_report
from jaxllm.data.source import Source
from jaxllm.data.stream import held_out_rows
from jaxllm.data.tokenizer import bytes_per_target
from jaxllm.errors import UserError
from jaxllm.files import check_file, write_json
from jaxllm.store.folder import DATA_REPORT, TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "held_out.safetensors"
"""In a run's folder."""

MAX_BYTES = 2**32

FORMAT = 1
"""Increase it when the same text gives other rows."""


class HeldOut(NamedTuple):
    """Rows, and what was read to make them."""

    rows: np.ndarray  # (n,T) int32
    seen: list[Seen]  # of each source
    tokens: TextCounts


def read_or_make(config: RunConfig, tokenizer: PreTrainedTokenizerBase, source: Source, resumes: bool) -> HeldOut:
    """The rows that a run's folder keeps, if they were made of the same text in the same way; or new ones.

    Raises:
        UserError: the held-out part does not fill one row.
    """
    if resumes and (kept := _kept(config, source)) is not None:
        return kept
    opened: list[Source] = []
    counts = TextCounts()
    rows = held_out_rows(config, tokenizer, opened, counts)
    parts = zip(*(one.reports() for one in opened), strict=True)
    return HeldOut(rows, [sum((part.seen for part in shards), Seen()) for shards in parts], counts)


def _kept(config: RunConfig, source: Source) -> HeldOut | None:
    with contextlib.suppress(UserError, OSError, SafetensorError, ValueError, KeyError, TypeError):  # it is damaged
        check_file(config.folder / FILE, MAX_BYTES)
        with safe_open(config.folder / FILE, "numpy") as file:
            rows, facts = file.get_tensor("rows"), json.loads((file.metadata() or {})["facts"])
        fits = rows.dtype == np.int32 and rows.ndim == 2 and rows.shape[1] == config.data.seq_len and len(rows) > 0
        if fits and facts["key"] == _key(config, source) and 0 <= rows.min() <= rows.max() < config.model.vocab_size:
            return HeldOut(rows, [Seen(**seen) for seen in facts["seen"]], TextCounts(**facts["tokens"]))
    return None


def keep(config: RunConfig, source: Source, held_out: HeldOut) -> None:
    """Write the rows into the run's folder, which has its tokenizer; without them, the next start makes them again."""
    tokens, seen = dataclasses.asdict(held_out.tokens), [dataclasses.asdict(each) for each in held_out.seen]
    facts = {"key": _key(config, source), "seen": seen, "tokens": tokens}
    with contextlib.suppress(OSError):
        part = config.folder / f".{FILE}"
        save_file({"rows": np.ascontiguousarray(held_out.rows)}, part, {"facts": json.dumps(facts)})
        part.replace(config.folder / FILE)


def report_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, source: Source, held_out: HeldOut) -> None:
    """Write and print what the run reads."""
    reports = source.reports()
    for report, seen in zip(reports, held_out.seen, strict=True):
        report.seen = seen
    report = make_report(
        reports,
        source.notes,
        held_out.tokens,
        bytes_per_token=bytes_per_target(tokenizer, held_out.rows),
        training_tokens=config.schedule.steps * config.tokens_per_step,
        epochs=config.schedule.epochs,
        weights=source.shares if isinstance(source, Mixture) else {},
    )
    write_json(config.folder / DATA_REPORT, report.to_dict())
    for line in report.lines():
        print(f"Data: {line}")


def _key(config: RunConfig, source: Source) -> str:
    """What decides the rows: the content of the text, how it is read and encoded, and how many there are."""
    options = dataclasses.asdict(config.data) | {"source": None, "eval_data": None}  # both by their content
    evaluated = [evaluation.open().revision for evaluation in source.evaluations]
    tokenizer = [_digest(file) for file in sorted((config.folder / TOKENIZER).rglob("*")) if file.is_file()]
    decisive = [FORMAT, options, evaluated, tokenizer, config.logging.eval_samples, config.data_streams]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _digest(file: Path) -> Any:
    return [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
