"""The rows that a run is evaluated on, which its folder keeps; and the report of its data, which reading them gives."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxllm.config import RunConfig
from jaxllm.data.held_out import HeldOut, read_held_out
from jaxllm.data.mixture import Mixture
from jaxllm.data.report import Counts, make_report
from jaxllm.data.source import Source
from jaxllm.data.tokenizer import bytes_per_target, text_bytes
from jaxllm.errors import UserError
from jaxllm.files import check_file, write_json
from jaxllm.model.batch import IGNORED, are_rows, token_batch
from jaxllm.store.folder import DATA_REPORT, TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "held_out.safetensors"
"""In a run's folder."""

MAX_BYTES = 2**32

FORMAT = 1
"""Increase it when the same text gives other rows."""


def read_or_make(config: RunConfig, tokenizer: PreTrainedTokenizerBase, source: Source, resumes: bool) -> HeldOut:
    """The rows that a run's folder keeps, if they were made of the same text in the same way; or new ones.

    Raises:
        UserError: the held-out part does not fill one row.
    """
    kept = _kept(config, source) if resumes else None
    return kept or read_held_out(config, tokenizer)


def _kept(config: RunConfig, source: Source) -> HeldOut | None:
    with contextlib.suppress(UserError, OSError, SafetensorError, ValueError, KeyError, TypeError):  # it is damaged
        check_file(config.folder / FILE, MAX_BYTES)
        with safe_open(config.folder / FILE, "numpy") as file:
            rows, facts = file.get_tensor("rows"), json.loads((file.metadata() or {})["facts"])
        fits = rows.ndim == 2 and rows.shape[1] == config.data.seq_len and len(rows) > 0
        if fits and facts["key"] == _key(config, source) and are_rows(rows, config.model.vocab_size):
            return HeldOut(rows, [Counts(**seen) for seen in facts["seen"]], Counts(**facts["encoded"]))
    return None


def keep(config: RunConfig, source: Source, held_out: HeldOut) -> None:
    """Write the rows into the run's folder, which has its tokenizer; without them, the next start makes them again."""
    encoded, seen = dataclasses.asdict(held_out.encoded), [dataclasses.asdict(each) for each in held_out.seen]
    facts = {"key": _key(config, source), "seen": seen, "encoded": encoded}
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
        held_out.encoded,
        bytes_per_token=_bytes_per_token(config, tokenizer, held_out.rows),
        training_tokens=config.schedule.steps * config.tokens_per_step,
        epochs=config.schedule.epochs,
        weights=source.shares if isinstance(source, Mixture) else {},
        rows=_about_rows(config, held_out.rows),
    )
    write_json(config.folder / DATA_REPORT, report.to_dict())
    for line in report.lines():
        print(f"Data: {line}")


def _bytes_per_token(config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: np.ndarray) -> float:
    """Bytes of text for each token of a row, padding included."""
    if not config.data.has_targets:
        return bytes_per_target(tokenizer, rows)
    return text_bytes(tokenizer, token_batch(rows, config.data).ids[rows != IGNORED][None]) / rows.size


def _about_rows(config: RunConfig, rows: np.ndarray) -> str:
    """What the rows of a run hold, where they are not full of targets."""
    if not config.data.has_targets:
        return ""
    full, targets = (rows != IGNORED).mean(), (token_batch(rows, config.data).labels[:, 1:] != IGNORED).mean()
    return (
        f"trained on {config.data.train_on}, documents {config.data.documents}: in the rows that are evaluated, "
        f"{100 * full:.1f} % of the positions are tokens, and {100 * targets:.1f} % are targets"
    )


def _key(config: RunConfig, source: Source) -> str:
    """What decides the rows: the content of the text, how it is read and encoded, and how many there are."""
    options = dataclasses.asdict(config.data) | {"source": None, "eval_data": None}  # both by their content
    evaluated = [evaluation.open().revision for evaluation in source.evaluations]
    tokenizer = [_digest(file) for file in sorted((config.folder / TOKENIZER).rglob("*")) if file.is_file()]
    decisive = [FORMAT, options, evaluated, tokenizer, config.logging.eval_samples, config.data_streams]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _digest(file: Path) -> Any:
    return [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
