"""Documents as token ids: a document that is read in pieces has the same tokens as if it were encoded whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxllm.config.groups import JOINED_TEXTS, DataConfig
from jaxllm.data.chats import Chat, Pair
from jaxllm.data.encode import MARGIN, ChatTokens, Encoder, Spans, strings_in
from jaxllm.data.report import Counts
from jaxllm.data.source import CLOSING, TextChunk
from jaxllm.errors import UserError
from jaxllm.model.batch import DOCUMENT_END, NOT_TARGET

SETTLED = 8
"""Words that must follow a cut, and that precede it in the next window: far more than a pre-tokenizer depends on."""

MAX_PENDING = 2**21
"""Characters without a place to cut after which a document is cut anyway."""

MAX_UNKNOWN, SAID_UNKNOWN = 0.2, 0.01
"""Shares of unknown tokens above which a tokenizer is refused, and above which the share is printed."""


class DocumentEncoder:
    """Encodes a series of chunks, in which a document may come in pieces, as if each document came whole.

    Text is encoded in windows. Each begins with some words of the one before, whose tokens are dropped, so that the
    tokenizer adds nothing that begins a text. Each ends where later text cannot change the tokens; the rest waits for
    the next piece. A piece whose predecessor is missing (held out, or of another shard) does not begin a text either.

    Tokens are marked (`jaxllm.model.batch`) where the run trains on the assistant's alone or keeps documents separate.
    """

    def __init__(self, encoder: Encoder, data: DataConfig = JOINED_TEXTS, counts: Counts | None = None):
        """`data`: its `train_on` and `documents` are read. `counts`: where to count; default: from zero."""
        self.encoder, self.counts = encoder, counts or Counts()
        self._marks_targets, self._marks_ends = data.train_on == "assistant", data.documents == "separate"
        self._reset()

    def _reset(self, document_is_open: bool = False) -> None:
        self._text = ""  # not encoded yet, with context before it
        self._done = 0  # characters of that context
        self._next_part = -1 if document_is_open else 0  # 0: no document is open; -1: the next piece is not known
        self._try_at = 0  # characters to wait for before a cut is tried

    @property
    def state(self) -> list[Any]:
        """What a later encoder needs to continue here; JSON values."""
        return [self._text, self._done, self._next_part, self._try_at]

    @state.setter
    def state(self, state: list[Any]) -> None:
        self._text, self._done, self._next_part, self._try_at = state

    def add(self, chunk: TextChunk) -> np.ndarray | None:
        """The tokens that no later text changes: (n,) int32. None: the chat is skipped, because it has no
        target, or because the template refuses it.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        text = chunk.text
        if not isinstance(text, str):
            chat = self._chat_or_pair(text, chunk.ends_document)
            return None if chat is None else np.concatenate([self._closed(), chat])
        if chunk.part == CLOSING:
            return self._closed()
        if self.encoder.pieces_apart:
            self._count_special(text, 0, len(text))
            return self._counted(self.encoder.ids(text), chunk.ends_document)
        waiting = []
        if chunk.part == 0 or chunk.part != self._next_part:
            waiting = [self._closed() if chunk.part == 0 else self.flush()]
            context = "" if chunk.part == 0 else self._context(text)
            self._text, self._done = context, len(context)
        self._text += text
        self._next_part = chunk.part + 1
        if chunk.ends_document:
            ids = self._rest(ends_document=True)
        else:
            ids = self._settled() if len(self._text) >= self._try_at else np.zeros(0, np.int32)
        return np.concatenate([*waiting, ids])

    def flush(self) -> np.ndarray:
        """The tokens of text that waits for a piece which does not come."""
        return self._rest(ends_document=False) if self._text else np.zeros(0, np.int32)

    def _closed(self) -> np.ndarray:
        """The last tokens of the open document, if there is one."""
        return self._rest(ends_document=True) if self._next_part else np.zeros(0, np.int32)

    def _chat_or_pair(self, text: Chat | Pair, ends_document: bool) -> np.ndarray | None:
        is_chat = not isinstance(text, Pair) or not isinstance(text.prompt, str)
        if is_chat and not self.encoder.tokenizer.chat_template:
            raise UserError(
                "data: its rows are chats, and the tokenizer has no chat template: put a chat_template.jinja into its "
                "folder, or pass a --tokenizer that has one, or --text-field"
            )
        try:
            ids, is_target, last_only = self._tokens_of(text, ends_document)
        except Exception:  # a template can raise anything
            self.counts.refused += 1
            return None
        if not is_target.any():
            self.counts.without_target += 1
            return None
        for one in strings_in([*text]):
            self._count_special(one, 0, len(one))
        self.counts.chats += is_chat
        self.counts.pairs += not is_chat
        self.counts.targets += int(is_target.sum())
        self.counts.last_only += last_only
        self._count(ids, ends_document)
        return self._with_end_mark(ids | np.where(is_target, 0, NOT_TARGET).astype(np.int32))

    def _tokens_of(self, text: Chat | Pair, ends_document: bool) -> ChatTokens:
        encoder = self.encoder
        prompt, completion = text if isinstance(text, Pair) else ([], text)
        if isinstance(prompt, str) and isinstance(completion, str):
            tokens = encoder.pair_targets(prompt, completion)
        elif self._marks_targets:
            tokens = encoder.chat_targets([*prompt, *completion], first=len(prompt))  # pyright: ignore
        else:
            ids = encoder.chat_ids([*prompt, *completion])  # pyright: ignore
            ids = encoder.with_end(ids) if ends_document else ids
            tokens = ChatTokens(ids, np.ones(len(ids), bool))
        return tokens if self._marks_targets else tokens._replace(is_target=np.ones(len(tokens.ids), bool))

    def _count_special(self, text: str, start: int, stop: int) -> None:
        for at, is_end in self.encoder.special_in(text, start):
            self.counts.special += at < stop
            self.counts.ends += at < stop and is_end

    def _count(self, ids: np.ndarray, ends_document: bool) -> None:
        self.counts.tokens += ids.size
        self.counts.unknown += self.encoder.unknown_in(ids)
        self.counts.documents += ends_document

    def _counted(self, ids: np.ndarray, ends_document: bool) -> np.ndarray:
        ids = self.encoder.with_end(ids) if ends_document else ids
        self._count(ids, ends_document)
        self.counts.targets += ids.size
        return self._with_end_mark(ids) if ends_document else ids

    def _with_end_mark(self, ids: np.ndarray) -> np.ndarray:
        if self._marks_ends and ids.size:
            ids = ids.copy()
            ids[-1] |= DOCUMENT_END
        return ids

    def _context(self, text: str) -> str:
        """Text to encode in front of a piece whose predecessor is missing, so that the piece does not begin a text."""
        for context in ("\n", "a", "."):
            spans = self.encoder.spans(context + text[:MARGIN])
            if _first_behind(spans, len(context)) is not None:
                return context
        return ""

    def _rest(self, ends_document: bool) -> np.ndarray:
        spans, text, done = self.encoder.spans(self._text), self._text, self._done
        self._reset(document_is_open=not ends_document)
        return self._taken(spans, text, done, len(spans.ids), len(text), ends_document)

    def _taken(self, spans: Spans, text: str, done: int, stop: int, cut: int, ends_document: bool) -> np.ndarray:
        """The tokens up to the one at `stop`, which begins at the character `cut`."""
        first = int((spans.ends <= done).sum()) if done else 0
        self._count_special(text, done, cut)
        if self.encoder.drops_characters:
            self.counts.unknown += _without_token(spans, text, done, cut)
        return self._counted(spans.ids[first:stop], ends_document)

    def _settled(self) -> np.ndarray:
        """The tokens that no further text changes; the rest of the text waits, with some words before it."""
        spans, text, done = self.encoder.spans(self._text), self._text, self._done
        found = self._cut(spans)
        if found is None and len(text) > MAX_PENDING:
            return self._rest(ends_document=False)  # the next piece continues as after a missing one
        if found is None:
            self._try_at = 2 * len(text)
            return np.zeros(0, np.int32)
        stop, cut, start = found
        self._text, self._done, self._try_at = text[start:], cut - start, 0
        return self._taken(spans, text, done, stop, cut, ends_document=False)

    def _cut(self, spans: Spans) -> tuple[int, int, int] | None:
        """The token at which to cut, the character there, and where the next window begins; None: nowhere yet.

        The cut is verified: encoded from that beginning on, the text must have the same tokens after it.
        """
        breaks = self.encoder.breaks(spans)
        last = len(self._text) - self.encoder.margin
        usable = breaks[:-SETTLED]
        usable = usable[(spans.ends[usable - 1] <= last) & (spans.ends[usable - 1] > self._done)]
        for number in range(len(usable) - 1, max(-1, len(usable) - 4), -1):
            stop = int(usable[number])
            cut = int(spans.ends[stop - 1])
            place = int(np.searchsorted(breaks, stop))
            for words in (SETTLED, 4 * SETTLED):
                start = int(spans.ends[breaks[place - words] - 1]) if place >= words else 0
                window = self.encoder.spans(self._text[start:])
                first = _first_behind(window, cut - start)
                if first is not None and np.array_equal(window.ids[first:], spans.ids[stop:]):
                    return stop, cut, start
        return None


def _first_behind(spans: Spans, character: int) -> int | None:
    """The first token that begins at a character or later; None: a token spans that character."""
    first = int((spans.ends <= character).sum())
    clear = (spans.ends[:first] <= character).all() and (spans.starts[first:] >= character).all()
    return first if clear else None


def _without_token(spans: Spans, text: str, start: int, stop: int) -> int:
    """Number of characters of a part of a text that have no token, without whitespace."""
    covered = np.zeros(len(text) + 1, np.int64)
    np.add.at(covered, spans.starts, 1)
    np.add.at(covered, spans.ends, -1)
    missing = np.flatnonzero(np.cumsum(covered)[start:stop] == 0)
    return sum(not text[start + int(at)].isspace() for at in missing)


def check_vocabulary(counts: Counts, refuse: bool = True) -> None:
    """Compare what was encoded with the tokenizer's vocabulary; print a line if much is missing.

    Raises:
        UserError: so much is missing that the tokenizer does not fit, and `refuse`.
    """
    share = counts.unknown_share
    said = f"{100 * share:.1f} % of the text's tokens are the unknown token"
    if share > MAX_UNKNOWN and refuse:
        raise UserError(f"tokenizer: {said}: pass a --tokenizer that fits the data, or leave it out to train one")
    if share > SAID_UNKNOWN:
        print(f"Tokenizer: {said}")


def encoded(encoder: DocumentEncoder, chunks: Iterable[TextChunk]) -> Iterator[np.ndarray]:
    """The tokens of chunks, in parts, without the chats that are skipped."""
    for chunk in chunks:
        if (ids := encoder.add(chunk)) is not None:
            yield ids
    yield encoder.flush()
