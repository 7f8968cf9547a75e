"""The rows that a run is evaluated on, as it reads them from the held-out part of its data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.config import RunConfig
from jaxllm.data.documents import DocumentEncoder, check_vocabulary, encoded
from jaxllm.data.encode import encoder_of
from jaxllm.data.packing import pack_in_order
from jaxllm.data.reading import CHUNK_CHARS
from jaxllm.data.report import Counts
from jaxllm.data.source import Source
from jaxllm.data.sources import open_source
from jaxllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HeldOut(NamedTuple):
    """Rows, and what was read to make them."""

    rows: np.ndarray  # (n,T) int32, as they travel (`jaxllm.model.batch`)
    seen: list[Counts]  # of each source
    encoded: Counts


def read_held_out(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Up to `eval_samples` rows of the held-out part, packed in order, at least one.

    They do not depend on the run's seed, so that runs with different seeds are evaluated on the same text. Each of
    several data streams gives an equal share, if it has that many, of what is held out of its shard.

    Raises:
        UserError: the held-out part does not fill one row, or the tokenizer does not fit it.
    """
    config = dataclasses.replace(config, seed=0)
    data, samples, S = config.data, config.logging.eval_samples, config.data_streams
    opened, counts = [open_source(config, s, S) for s in range(S)], Counts()
    parts, have = [], 0
    for s, source in enumerate(opened):
        share = (s + 1) * samples * data.seq_len / S
        documents = DocumentEncoder(encoder_of(tokenizer, data.special_tokens_in_text), data, counts)
        for tokens in encoded(documents, source.held_out()) if have < share else ():
            parts.append(tokens)
            have += len(parts[-1])
            if have >= share:
                break
    tokens = np.concatenate([np.zeros(0, np.int32), *parts])
    if data.documents == "separate":
        rows = pack_in_order([tokens], data.seq_len, samples)
    else:
        count = min(samples, have // data.seq_len)
        rows = tokens[: count * data.seq_len].reshape(count, data.seq_len)
    _check(config, opened, counts, have, len(rows))
    check_vocabulary(counts, refuse=data.special_tokens_in_text != "earlier")
    shards = zip(*(source.reports() for source in opened), strict=True)
    return HeldOut(rows, [sum((part.seen for part in parts), Counts()) for parts in shards], counts)


def _check(config: RunConfig, opened: list[Source], counts: Counts, tokens: int, rows: int) -> None:
    what = f"data is {config.data.source!r}: "
    if tokens == 0 and config.data.hold_out == "nothing":
        raise UserError(
            f"{what}the run holds nothing out of it, and the text that it is evaluated on is "
            "gone or has nothing to read: put it back, or pass --eval-data"
        )
    if tokens == 0 and (skipped := counts.without_target + counts.refused):
        raise UserError(
            f"{what}of {skipped} chats that were read to be evaluated, {counts.refused} are of a form that the chat "
            f"template does not take, and in {counts.without_target} the role assistant says nothing: mend them, or "
            "pass --train-on all"
        )
    if tokens == 0:
        rows_read = sum(report.seen.documents for source in opened for report in source.reports())
        reason, more = (
            f"it is one row, or a text of at most {CHUNK_CHARS} characters, which",
            "two rows or files at least",
        )
        if rows_read > 1:
            reason, more = (
                f"of its {rows_read} rows, those that could be held out are too large a part, which",
                "more rows",
            )
        raise UserError(f"{what}{reason} leaves nothing to evaluate on: pass {more}, or other text as --eval-data")
    if rows == 0:
        raise UserError(
            f"{what}its held-out part has {tokens} tokens, which do not fill one row of "
            f"seq_len = {config.data.seq_len}: pass more text or a smaller --seq-len"
        )
