"""The rows that a run is evaluated on, as it reads them from the held-out part of its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.config.groups import DataConfig
from jaxllm.data.documents import DocumentEncoder, check_vocabulary, encoded
from jaxllm.data.encode import encoder_of
from jaxllm.data.packing import pack_in_order
from jaxllm.data.reading import CHUNK_CHARS
from jaxllm.data.report import Counts
from jaxllm.data.source import Shard
from jaxllm.data.sources import open_source
from jaxllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HeldOut(NamedTuple):
    """Rows, and what was read to make them."""

    rows: np.ndarray  # (n,T) int32, in the form of `jaxllm.model.batch`
    seen: list[Counts]  # of each source
    encoded: Counts


def read_held_out(data: DataConfig, samples: int, streams: int, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Up to `samples` rows of the held-out part, packed in order, at least one.

    They do not depend on the run's seed, so that runs with different seeds are evaluated on the same text. Each of
    several data streams gives an equal share, if it has that many, of what is held out of its shard.

    Raises:
        UserError: the held-out part does not fill one row, or the tokenizer does not fit it.
    """
    sources, counts = [open_source(data, seed=0, shard=Shard(s, streams)) for s in range(streams)], Counts()
    parts, have = [np.zeros(0, np.int32)], 0
    for s, source in enumerate(sources):
        share = (s + 1) * samples * data.seq_len / streams
        documents = DocumentEncoder(encoder_of(tokenizer, data.special_tokens_in_text), data, counts)
        for tokens in encoded(documents, source.held_out()) if have < share else ():
            parts.append(tokens)
            have += len(parts[-1])
            if have >= share:
                break
    rows = pack_in_order(np.concatenate(parts), data.seq_len, samples, data.documents == "separate")
    shards = zip(*(source.reports() for source in sources), strict=True)
    found = HeldOut(rows, [sum((report.seen for report in reports), Counts()) for reports in shards], counts)
    _check(data, found, have)
    check_vocabulary(counts, refuse=data.special_tokens_in_text != "earlier")
    return found


def _check(data: DataConfig, found: HeldOut, tokens: int) -> None:
    """Raise UserError if `tokens` held-out tokens have not filled one row."""
    what, counts = f"data is {data.source!r}: ", found.encoded
    if tokens == 0 and data.hold_out == "nothing":
        raise UserError(
            f"{what}the run has no held-out part, and the text that it is evaluated on is missing or "
            "empty: put it back, or pass --eval-data"
        )
    if tokens == 0 and (skipped := counts.without_target + counts.refused):
        raise UserError(
            f"{what}of {skipped} chats that were read to be evaluated, {counts.refused} are of a form that the chat "
            f"template does not take, and in {counts.without_target} the role assistant says nothing: fix them, or "
            "pass --train-on all"
        )
    if tokens == 0:
        rows_read = sum(seen.documents for seen in found.seen)
        reason, more = f"it is one row, or a text of at most {CHUNK_CHARS} characters", "two rows or files at least"
        if rows_read > 1:
            reason, more = f"of its {rows_read} rows, those that could be held out are too large a part", "more rows"
        raise UserError(
            f"{what}{reason}, which leaves nothing to evaluate on: pass {more}, or other text as --eval-data"
        )
    if not len(found.rows):
        raise UserError(
            f"{what}its held-out part has {tokens} tokens, which do not fill one row of "
            f"seq_len = {data.seq_len}: pass more text or a smaller --seq-len"
        )
