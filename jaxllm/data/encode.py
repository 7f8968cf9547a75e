"""Encodes a text or a chat as token ids; a special token that a text spells out is encoded as plain text."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxllm.data.chat_turns import assistant_turns
from jaxllm.data.chats import Chat, valid_unicode
from jaxllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0\ufdd1"
"""Put into the text of a special token so that it is not matched; the normalizer removes it first. Two noncharacters of
Unicode; a text that contains them keeps them."""

MARGIN = 64
"""Most characters on either side that a normalizer or a pre-tokenizer depends on, besides whole words."""

FEW_WORDS = 16
"""A text with no more words than this is cut between pieces of the vocabulary."""

TAIL = 8
"""Number of last tokens of a text that are searched for an end token of its own, which whitespace may follow."""


class Spans(NamedTuple):
    """Tokens of a text, each with the characters that it stands for, and the number of its word."""

    ids: np.ndarray  # (n,) int32
    starts: np.ndarray  # (n,)
    ends: np.ndarray  # (n,)
    words: np.ndarray  # (n,)


class ChatTokens(NamedTuple):
    """A chat, or a pair, as tokens."""

    ids: np.ndarray  # (n,) int32
    is_target: np.ndarray  # (n,) bool, what the assistant says, or the completion
    last_only: bool = False  # whether only the last answer is a target, since the template changes earlier ones


class Encoder:
    """A tokenizer as training uses it: without what it adds at the ends of a text, and without dropout.

    With `special_tokens` of `text`, a special token that a text or a message spells is encoded as other characters are;
    only the chat template's own are control tokens. The same holds for tokens that are not marked special, but with
    which the chat template begins or ends a user's turn. A special token of one character stays one, because no other
    token encodes it. An encoder does not change, so threads may share it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: str):
        self.tokenizer = tokenizer
        self._keeps = special_tokens != "text"
        self.pieces_apart = special_tokens == "earlier"
        self._template = _template_of(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("the tokenizer has no tokenizer.json, which a run needs: pass another --tokenizer")
        added = backend.get_added_tokens_decoder()
        plain = [token.content for token in added.values() if token.content.strip() and not token.special]
        special = {*tokenizer.all_special_ids}
        markers = _turn_markers(tokenizer, plain)
        control = {i: t.content for i, t in added.items() if t.special or i in special or t.content in markers}
        control |= {i: str(tokenizer.convert_ids_to_tokens(i)) for i in special - control.keys()}
        control = {id: text for id, text in control.items() if len(text) > 1}
        self._ends_turns = {*control}
        self._control = {} if self._keeps else control
        self.margin = MARGIN + max((len(token.content) for token in added.values()), default=0)
        spec = json.loads(backend.to_str())
        self._unknown = _unknown_id(spec["model"])
        self.drops_characters = spec["model"]["type"] == "BPE" and self._unknown is None and not _has_bytes(spec)
        normalizer = backend.normalizer
        as_spelled = {t for t in self._control.values() if normalizer is None or normalizer.normalize_str(t) == t}
        self._backend = _backend_of(spec, as_spelled, breaks=bool(self._control))
        self._special = _any_of({*control.values()})
        self._beginnings = tuple({text[:length] for text in self._control.values() for length in range(1, len(text))})

    def ids(self, text: str) -> np.ndarray:  # (n,) int32
        """The tokens of a whole text."""
        return np.asarray(self._tokens(self._escaped(text))[0], np.int32)

    def special_in(self, text: str, start: int = 0) -> Iterator[tuple[int, bool]]:
        """Where special tokens are spelled in a text, and whether each is the end token."""
        for found in self._special.finditer(text, start):
            yield found.start(), found[0] == self.tokenizer.eos_token

    def unknown_in(self, ids: np.ndarray) -> int:
        """Number of unknown tokens, which stand for characters that the vocabulary lacks."""
        return 0 if self._unknown is None else int((ids == self._unknown).sum())

    def chat_ids(self, chat: Chat, add_generation_prompt: bool = False) -> np.ndarray:  # (n,) int32
        """The tokens of a chat as its template renders it; the template may raise any exception."""
        return np.asarray(self._tokens(self._rendered(chat, add_generation_prompt))[0], np.int32)

    def chat_targets(self, chat: Chat, first: int = 0) -> ChatTokens:
        """The tokens of a chat as its template renders it, and which of them the assistant says after `first` messages.

        One end token follows, unless the template has ended the last turn. The template may raise any exception,
        and ValueError is raised where its renderings do not tell what the assistant says.
        """
        text, turns, last_only = assistant_turns(self._rendered, self._same_tokens, chat, first, self._template)
        spans = self._spans_of(text)
        is_target = np.zeros(len(spans.ids), bool)
        for start, stop in turns:
            ends = [found.end() for found in self._special.finditer(text, start, stop)]
            if ends and not text[ends[-1] : stop].strip():
                stop = ends[-1]  # what follows the end token is never generated
            is_target |= (spans.ends > start) & (spans.starts < stop)
        said = np.flatnonzero(is_target)
        ids = spans.ids
        has_ended = self._has_end(ids) or (said.size and int(ids[said[-1]]) in self._ends_turns)
        if self.eos is not None and not has_ended:
            ids, is_target = np.append(ids, np.int32(self.eos)), np.append(is_target, is_target[-1:])
        return ChatTokens(ids, is_target, last_only)

    def pair_targets(self, prompt: str, completion: str) -> ChatTokens:
        """The tokens of a prompt and its completion, with an end token."""
        spans = self.spans(prompt + completion)
        ids, is_target = self.with_end(spans.ids), spans.ends > len(prompt)
        return ChatTokens(ids, np.append(is_target, [True] * (len(ids) - len(spans.ids))))

    def _rendered(self, chat: Chat, add_generation_prompt: bool = False, template: str | None = None) -> str:
        messages: Any = self._escaped_within(chat)
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=template
        )
        return valid_unicode(str(text))

    def _same_tokens(self, one: str, other: str) -> int:
        """The character of `other` up to which two renderings have the same tokens."""
        ours, theirs = self._spans_of(one), self._spans_of(other)
        shorter = min(len(ours.ids), len(theirs.ids))
        different = np.flatnonzero(ours.ids[:shorter] != theirs.ids[:shorter])
        same = int(different[0]) if different.size else shorter
        return int(theirs.starts[same]) if same < len(theirs.ids) else len(other)

    def with_end(self, ids: np.ndarray) -> np.ndarray:
        """A document's last tokens, with the end token, unless the document ends with one of its own."""
        return ids if self.eos is None or self._has_end(ids) else np.append(ids, np.int32(self.eos))

    def _has_end(self, ids: np.ndarray) -> bool:
        tail = ids[-TAIL:].tolist()
        if self.eos not in tail or self.pieces_apart:
            return False
        after = tail[len(tail) - tail[::-1].index(self.eos) :]
        return not after or not str(self.tokenizer.decode(after)).strip()

    def spans(self, text: str) -> Spans:
        """The tokens of a text, and what they stand for."""
        escaped = self._escaped(text)
        spans = self._spans_of(escaped)
        if marks := [found.end() for found in re.finditer(MARK, escaped)]:  # as characters of the text itself
            starts, ends = (
                at - len(MARK) * np.searchsorted(marks, at, side="right") for at in (spans.starts, spans.ends)
            )
            return spans._replace(starts=starts, ends=ends)
        return spans

    def _spans_of(self, escaped: str) -> Spans:
        ids, encoding, origin = self._tokens(escaped)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        words = np.asarray([-1 if word is None else word for word in encoding.word_ids], np.int64)
        if origin is not None:
            offsets, words = offsets[origin], words[origin]
        return Spans(np.asarray(ids, np.int32), offsets[:, 0], offsets[:, 1], words)

    def breaks(self, spans: Spans) -> np.ndarray:
        """Tokens, in order, before which a text can be cut so that both parts are encoded as in the whole.

        They begin words; in a text without words, no piece of the vocabulary may join the characters at the cut.
        """
        ids, words = spans.ids, spans.words
        between = spans.ends[:-1] <= spans.starts[1:]
        found = between & (words[1:] != words[:-1])
        if found.sum() <= FEW_WORDS and self._joined is not None:
            pieces = [self._backend.id_to_token(id) for id in ids.tolist()]
            meeting = [one[-1:] + two[:1] for one, two in itertools.pairwise(pieces)]
            unknown = ids == self._unknown
            apart = np.asarray([pair not in self._joined for pair in meeting], bool)
            found = between & apart & ~(unknown[1:] & unknown[:-1])
        return np.flatnonzero(found) + 1

    @functools.cached_property
    def _joined(self) -> set[str] | None:
        """Pairs of characters within the pieces of the vocabulary; None: the model takes a text as one word."""
        if type(self._backend.model).__name__ not in ("BPE", "Unigram"):
            return None
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        return {piece[i : i + 2] for piece in vocabulary if not _is_byte(piece) for i in range(len(piece) - 1)}

    def _tokens(self, escaped: str) -> tuple[list[int], Any, list[int] | None]:
        """Ids of a text, the library's encoding, and the index of each id in it; None: they are the encoding's ids."""
        encoding = self._backend.encode(escaped, add_special_tokens=False)
        if self._control.keys().isdisjoint(encoding.ids):
            return encoding.ids, encoding, None
        ids, origin = [], []
        for number, (id, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            meant = self._is_meant(id, escaped[start:end])
            parts = [id] if meant else self._in_parts(id)
            ids += parts
            origin += [number] * len(parts)
        return ids, encoding, origin

    def _is_meant(self, id: int, text: str) -> bool:
        """Whether an id stands for this text, and is not a control token that the model made from other characters."""
        if id not in self._control:
            return True
        produced = id == self._unknown or _is_byte(self._control[id])  # for characters that the vocabulary lacks
        return MARK not in text and (produced or text.strip() == self._control[id].strip())

    def _in_parts(self, id: int) -> list[int]:
        model = self._backend.model
        piece = model.id_to_token(id) or self._control[id]
        return [token.id for part in (piece[:1], piece[1:]) for token in model.tokenize(part)]

    def _escaped(self, text: str) -> str:
        if self._keeps:
            return text
        text = text.replace(MARK, MARK[0] + MARK + MARK[1])
        while True:  # breaking one may leave another that overlapped it
            text, found = self._special.subn(lambda match: match[0][0] + MARK + match[0][1:], text)
            if not found:
                return text

    def _escaped_within(self, value: Any) -> Any:
        """A message as the template gets it. Where a text ends with the beginning of a special token, the template may
        add the rest, so `MARK` follows it."""
        if isinstance(value, str):
            return self._escaped(value) + (MARK if value.endswith(self._beginnings) else "")
        if isinstance(value, list):
            return [self._escaped_within(one) for one in value]
        if isinstance(value, dict):  # a template compares a role and the type of a part
            return {
                self._escaped(str(key)): self._escaped(one) if key in ("role", "type") else self._escaped_within(one)
                for key, one in value.items()
            }
        return value


def encoder_of(tokenizer: PreTrainedTokenizerBase, special_tokens: str = "text") -> Encoder:
    """The encoder of a tokenizer, made once for its present tokens and chat template.

    Raises:
        UserError: the tokenizer is not one of the library `tokenizers`.
    """
    return _made(tokenizer, len(tokenizer), str(tokenizer.chat_template), str(tokenizer.eos_token), special_tokens)


@functools.lru_cache(maxsize=4)
def _made(tokenizer: PreTrainedTokenizerBase, size: int, template: str, eos: str, special_tokens: str) -> Encoder:
    return Encoder(tokenizer, special_tokens)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, of several the one that is used; empty if there is none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return ""


def _backend_of(spec: dict[str, Any], as_spelled: set[str], breaks: bool) -> Any:
    """A tokenizer.json as the encoder uses it; with `breaks`, its normalizer removes `MARK`.

    Special tokens that its normalizer does not change are matched before it, so that `MARK` prevents the match.
    """
    from tokenizers import Tokenizer

    spec |= {"truncation": None, "padding": None, "post_processor": None}
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    if breaks:
        unmarked = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
        steps = [unmarked] if spec["normalizer"] is None else [unmarked, spec["normalizer"]]
        spec["normalizer"] = {"type": "Sequence", "normalizers": steps}
        for token in spec["added_tokens"]:
            token["normalized"] = token["normalized"] and token["content"] not in as_spelled
    return Tokenizer.from_str(json.dumps(spec))


def _unknown_id(model: dict[str, Any]) -> int | None:
    """The unknown token."""
    vocabulary = model.get("vocab")
    return vocabulary.get(model.get("unk_token")) if isinstance(vocabulary, dict) else model.get("unk_id")


def _has_bytes(spec: dict[str, Any]) -> bool:
    """Whether there is a token for each byte."""
    from tokenizers import pre_tokenizers

    vocabulary, model = spec["model"]["vocab"].keys(), spec["model"]
    fallback = model.get("byte_fallback") and vocabulary >= {f"<0x{byte:02X}>" for byte in range(256)}
    return bool(fallback) or vocabulary >= {*pre_tokenizers.ByteLevel.alphabet()}


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value if isinstance(value, list) else [*value.keys(), *value.values()]:
            yield from strings_in(one)


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """A pattern that matches one of some texts, the longest that it can; nothing where there are none."""
    return re.compile(_alternatives(sorted(texts)) if texts else "(?!)")


def _alternatives(texts: list[str]) -> str:
    """Alternatives of sorted texts, grouped by common prefixes: some tokenizers have thousands of special tokens."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(texts[0], texts[-1], strict=False))
    common = "".join(character for character, _ in same)
    rest: dict[str, list[str]] = {}
    for text in texts:
        rest.setdefault(text[len(common) : len(common) + 1], []).append(text[len(common) :])
    ends = rest.pop("", None) is not None
    longer = "|".join(map(_alternatives, rest.values()))
    return re.escape(common) + (f"(?:{longer}){'?' if ends else ''}" if longer else "")


def _is_byte(piece: str) -> bool:
    return re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None


def _turn_markers(tokenizer: PreTrainedTokenizerBase, added: list[str]) -> set[str]:
    """The added tokens that the chat template puts next to a user's words, or after an answer."""
    if not (tokenizer.chat_template and added):
        return set()
    said = ("qzxjkv", "vkjxzq", "zqvjxk")
    roles = ("user", "assistant", "user")
    chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # a template can raise anything; the rows then say what is wrong
        return set()
    parts = re.split("|".join(said), text)
    if len(parts) != len(said) + 1:
        return set()
    pattern = _any_of({*added})
    found = [pattern.findall(part) for part in parts]
    edges = (found[0][-1:], found[1][:1], found[2][:1], found[2][-1:], found[3][:1])
    return {token for edge in edges for token in edge}
