"""The report of a run's data: printed and written at its start. Imports neither JAX nor PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxllm.config import RunConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data.held_out import HeldOut
from jaxllm.data.mixture import Mixture
from jaxllm.data.report import DataReport
from jaxllm.data.source import Source
from jaxllm.data.tokenizer import bytes_per_target, text_bytes
from jaxllm.files import write_json
from jaxllm.model.batch import IGNORED, token_batch
from jaxllm.store.folder import DATA_REPORT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def report_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, source: Source, held_out: HeldOut) -> None:
    """Write and print what the run reads."""
    weights = source.shares if isinstance(source, Mixture) else {}
    trained_bytes = (
        config.schedule.steps * config.tokens_per_step * _bytes_per_token(config.data, tokenizer, held_out.rows)
    )
    reports = source.reports()
    for report, seen in zip(reports, held_out.seen, strict=True):
        report.seen = seen
        report.passes = report.passes_of(trained_bytes * weights.get(report.name, 1.0))
    about_rows = _about_rows(config.data, held_out.rows)
    report = DataReport(reports, source.notes, held_out.encoded, config.schedule.epochs, about_rows)
    write_json(config.folder / DATA_REPORT, report.to_dict())
    for line in report.lines():
        print(f"Data: {line}")


def _bytes_per_token(data: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: np.ndarray) -> float:
    """Bytes of text for each token of a row, padding included."""
    if not data.has_targets:
        return bytes_per_target(tokenizer, rows)
    return text_bytes(tokenizer, token_batch(rows, data).ids[rows != IGNORED][None]) / rows.size


def _about_rows(data: DataConfig, rows: np.ndarray) -> str:
    """What the rows of a run hold, where they are not full of targets."""
    if not data.has_targets:
        return ""
    full, targets = (rows != IGNORED).mean(), (token_batch(rows, data).labels[:, 1:] != IGNORED).mean()
    return (
        f"trained on {data.train_on}, documents {data.documents}: in the rows that are evaluated, "
        f"{100 * full:.1f} % of the positions are tokens, and {100 * targets:.1f} % are targets"
    )
