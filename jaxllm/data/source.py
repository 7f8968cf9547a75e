"""What a source of text is: chunks, and a position to continue from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from jaxllm.data.chats import Pair, Text
from jaxllm.data.report import Counts, SourceReport
from jaxllm.errors import UserError

HOLD_OUT = 20
"""One chunk in twenty is held out for evaluation."""

HoldOut = Literal["files", "chunks", "nothing", "count"]
"""What is held out of a source: whole files, chunks, or nothing where other text is evaluated. `count`: as earlier
versions did, whole files if there are `HOLD_OUT`, however large they are."""


CLOSING = -1
"""The part number of a chunk without text that ends a document, whose last chunk is not among those that are read."""


class TextChunk(NamedTuple):
    text: Text
    ends_document: bool
    held_out: bool
    part: int = 0  # of a document that comes in several chunks, which one this is
    repeated: bool = False  # in a mixture: whether it is of a later pass of its source


class Evaluation(NamedTuple):
    """Text that is evaluated in place of what a source would hold out."""

    name: str
    open: "Callable[[], Source]"

    def read_for(self, *sources: "Source") -> "Iterator[TextChunk]":
        """Its chunks, which count as what these sources have read."""
        opened = self.open()
        for source in sources:
            source.seen = opened.seen
        return opened.chunks()


class Shard(NamedTuple):
    """One of several disjoint parts of a corpus."""

    number: int = 0
    of: int = 1


WHOLE = Shard()


class Source(Protocol):
    """An endless series of passes over a corpus."""

    @property
    def position(self) -> dict[str, Any]:
        """Where the next chunk starts, and `skipped`, the rows without text of the first pass so far; JSON values.

        Setting a position that was taken from another corpus raises UserError.
        """
        ...

    @position.setter
    def position(self, position: dict[str, Any]) -> None: ...

    @property
    def revision(self) -> str:
        """What tells whether it is the same data: a commit of the Hub, or the fingerprint of files."""
        ...

    seen: Counts
    """What was read of it, or of the text that is evaluated in its place."""

    @property
    def hold_out(self) -> str:
        """A `HoldOut`; of a mixture, those of its parts, joined by `+`."""
        ...

    @property
    def evaluations(self) -> list[Evaluation]:
        """The text that is evaluated in place of a held-out part; of a mixture, that of its sources."""
        ...

    @property
    def left_out(self) -> dict[str, str]:
        """Files that turned out damaged and are no longer read, each with the reason."""
        ...

    @property
    def notes(self) -> list[str]:
        """Files that are not read from the start, with the reason, in lines."""
        ...

    def chunks(self) -> Iterator[TextChunk]:
        """Chunks from `position` to the end of the pass; afterwards `position` is the start of the next pass."""
        ...

    def held_out(self) -> Iterator[TextChunk]:
        """What is evaluated, from the start of a fresh source: what its shard holds out, or text of its own.

        Where whole files are held out, no other file is read.
        """
        ...

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        ...

    def has_file(self, pattern: str) -> bool:
        """Whether a pattern of --skip-data is of one of its files."""
        ...

    def reports(self) -> list[SourceReport]:
        """What is read of it; of a mixture, of each of its sources."""
        ...

    def progress(self) -> float | None:
        """Passes done, with a fraction; None where the size is not known."""
        ...


def utf8_bytes(text: Text) -> int:
    """Bytes of a text, of a pair, or of a chat's contents."""
    if isinstance(text, Pair):
        return sum(map(utf8_bytes, text))
    if isinstance(text, str):
        return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    return sum(utf8_bytes(str(message.get("content") or "")) for message in text)


def check_position(position: dict[str, Any], names: set[str]) -> None:
    """Raise a UserError if a data position has other keys: it is of another kind of data, or of an earlier version."""
    if position.keys() != names:
        raise UserError(
            f"the run's data position has {', '.join(sorted(position))} where {', '.join(sorted(names))} are expected: "
            "it is of other data or of an earlier version; pass the old data, or --overwrite to start over"
        )
