"""What a run reads, as it says at its start, in report.md and in metrics.jsonl. It costs no second pass over the data.

What is known without reading is exact. The rest is an estimate from the documents that are evaluated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counts:
    """What was read of a source, or encoded, in this process. A count of tokens is of what was encoded alone."""

    documents: int = 0  # texts and chats
    text_bytes: int = 0
    file_bytes: int = 0
    skipped_rows: int = 0  # without a text
    other_parts: int = 0  # of these, for a part of a message that is not text
    longest: int = 0  # bytes of the longest document
    within: int = 0  # of the document that has not ended
    chats: int = 0
    pairs: int = 0  # of a prompt and a completion that are texts
    without_target: int = 0  # chats in which nothing is trained on; they are skipped
    refused: int = 0  # chats that the chat template does not take; they are skipped
    last_only: int = 0  # chats in which only the last answer is a target
    tokens: int = 0
    targets: int = 0
    unknown: int = 0  # tokens for what the vocabulary lacks, and characters that have no token at all
    special: int = 0  # special tokens spelled in texts and messages
    ends: int = 0  # end tokens among them

    def add(self, text_bytes: int, ends_document: bool) -> None:
        self.text_bytes += text_bytes
        self.within += text_bytes
        if ends_document:
            self.documents += 1
            self.longest, self.within = max(self.longest, self.within), 0

    def __add__(self, other: Counts) -> Counts:
        added = (mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        return dataclasses.replace(Counts(*added), longest=max(self.longest, other.longest))

    @property
    def unknown_share(self) -> float:
        return self.unknown / max(1, self.tokens, self.unknown)


@dataclass
class Kind:
    """Files of one kind."""

    files: int = 0
    bytes: int = 0
    rows: int | None = None  # None: their number is not known without reading them
    is_text: bool = False  # each file is a document
    is_packed: bool = False  # compressed or in blocks: how much of a file has been read is not known


@dataclass
class SourceReport:
    """What is read of one source."""

    name: str
    kinds: dict[str, Kind]  # by ending; empty for a dataset of the Hub
    split: str
    splits: dict[str, int | None]  # files of each, where that is counted; empty if there are none
    evaluated: str  # what it is evaluated on
    share: float | None  # of its bytes that are held out, where that is known
    seen: Counts = field(default_factory=Counts)
    is_sampled: bool = True  # `seen` is of this source, not of other text that is evaluated
    is_repeated: bool = False  # `seen` is that of the source before it
    passes: float | None = None  # of the run over it, as an estimate; None: the size of the data is not known

    @property
    def bytes(self) -> int:
        return sum(kind.bytes for kind in self.kinds.values())

    def whole(self, sampled: int) -> float | None:
        """An estimate for the whole source from what was sampled of it; None if nothing is known."""
        is_known = self.is_sampled and self.seen.documents and self.seen.file_bytes
        if not is_known or any(kind.is_packed for kind in self.kinds.values()):
            return None
        return sampled * self.bytes / self.seen.file_bytes

    @property
    def text_bytes(self) -> float | None:
        """Bytes of its text; None: not known."""
        if all(kind.is_text and not kind.is_packed for kind in self.kinds.values()) and self.kinds:
            return self.bytes
        return self.whole(self.seen.text_bytes)

    def passes_of(self, trained_bytes: float) -> float | None:
        """Passes in which this many bytes of text are trained on, as an estimate; None: its size is not known."""
        text = self.text_bytes
        trained = text and text * (1 - (self.share or 0.0))
        return trained_bytes / trained if trained else None

    def _documents(self) -> str:
        kinds = self.kinds.values()
        if kinds and all(kind.is_text for kind in kinds):
            return counted(sum(kind.files for kind in kinds), "document")
        estimate = None if any(kind.is_text for kind in kinds) else self.whole(self.seen.documents)
        return "number of documents not known" if estimate is None else f"about {counted(round(estimate), 'document')}"

    def lines(self) -> list[str]:
        kinds = [
            f"{counted(kind.files, f'{ending} file')} "
            f"({_size(kind.bytes)}{'' if kind.rows is None else ', ' + counted(kind.rows, 'row')})"
            for ending, kind in sorted(self.kinds.items())
        ]
        splits = [
            name if files is None else f"{name} ({counted(files, 'file')})" for name, files in self.splits.items()
        ]
        return [
            f"{self.name}: {', '.join(kinds) or 'a dataset of the Hub, streamed'}; {self._documents()}",
            f"{self.name}: " + (f"split {self.split!r} of {', '.join(splits)}" if splits else "read without splits"),
            f"{self.name}: {self.evaluated}",
        ]


@dataclass
class DataReport:
    """What a run reads."""

    sources: list[SourceReport]
    not_read: list[str]
    encoded: Counts
    epochs: float | None = None  # passes that the user asked for
    rows: str = ""  # how the documents fill the rows

    def lines(self) -> list[str]:
        """The report in short lines, without what is not read."""
        seen = [source.seen for source in self.sources if not source.is_repeated]
        read = sum(each.documents + (each.within > 0) for each in seen)  # the last one may be read in part
        other = sum(each.other_parts for each in seen)
        skipped = f"{counted(sum(each.skipped_rows for each in seen), 'row')} without text skipped"
        facts = [
            f"longest document {_size(max(max(each.longest, each.within) for each in seen))}",
            skipped + (f", {other:,} of them for a part that is not text" if other else ""),
        ]
        tokens = self.encoded
        facts += [
            f"{100 * tokens.unknown_share:.2g} % unknown tokens",
            f"{counted(tokens.special, 'special token')} in texts, {tokens.ends:,} of them end tokens",
        ]
        passes = ", ".join(
            f"not known of {source.name}" if source.passes is None else f"about {source.passes:.2g} of {source.name}"
            for source in self.sources
        )
        if self.epochs is not None:
            passes = f"{self.epochs:g}, as --epochs says"
        return [
            *(line for source in self.sources for line in source.lines()),
            f"{counted(read, 'evaluated document')}: {', '.join(facts)}",
            *([self._chats()] if tokens.chats + tokens.pairs + tokens.refused + tokens.without_target else []),
            *([self.rows] if self.rows else []),
            "passes over the data: " + passes,
        ]

    def _chats(self) -> str:
        counts = self.encoded
        facts = {
            f"{counted(counts.chats, 'chat')}": counts.chats,
            f"{counted(counts.pairs, 'pair')} of prompt and completion": counts.pairs,
            f"{counted(counts.targets, 'target')} of {counted(counts.tokens, 'token')}": True,
            f"in {counts.last_only:,} only the last answer is a target, as the template changes earlier ones": (
                counts.last_only
            ),
            f"{counts.without_target:,} skipped, which have no answer": counts.without_target,
            f"{counts.refused:,} skipped, which the chat template does not take": counts.refused,
        }
        return "read as " + ", ".join(fact for fact, count in facts.items() if count)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, with its lines."""
        return dataclasses.asdict(self) | {"lines": self.lines()}


def counted(count: int, noun: str) -> str:
    """A count with its noun, in the plural unless it is one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
