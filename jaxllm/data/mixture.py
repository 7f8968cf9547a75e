"""Several sources with weights: each gives its share of the text, and keeps a position of its own."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.data.chats import Text
from jaxllm.data.report import Counts, SourceReport
from jaxllm.data.source import CLOSING, Evaluation, Source, TextChunk, check_position, utf8_bytes
from jaxllm.errors import UserError, listed, shown

JOINED = "+"
"""Between the revisions of the sources, and between what they hold out."""

_PART = re.compile(r"(.+?)=([0-9.]+(?:[eE][-+]?[0-9]+)?)(?:,|$)")


def weighted(data: str) -> dict[str, float]:
    """The sources of `A=0.7,B=0.3` with their weights; empty if it is something else.

    A name may contain commas and equals signs, as each ends with `=WEIGHT`.

    Raises:
        UserError: a weight is not positive, or a source occurs twice.
    """
    found = list(_PART.finditer(data))
    if len(found) < 2 or "".join(match[0] for match in found) != data:
        return {}
    weights: dict[str, float] = {}
    for match in found:
        name = match[1]
        try:
            weight = float(match[2])
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(f"data is {shown(data)}: the weight of {shown(name)} must be a positive number")
        if name in weights:
            raise UserError(f"data is {shown(data)}: {shown(name)} occurs twice; add its weights")
        weights[name] = weight
    return weights


class Mixture:
    """Documents of several sources in turn: the next one comes from the source that is furthest behind its share.

    Shares are of bytes of text. A source that ends begins again; a pass ends when each of them has ended.
    """

    def __init__(self, sources: Mapping[str, Source], weights: dict[str, float], evaluation: Evaluation | None):
        self._sources, self._evaluation = sources, evaluation
        total = sum(weights.values())
        self.shares = {name: weights[name] / total for name in sources}  # of the text
        self._given = [0] * len(sources)  # bytes of text
        self._skipped = 0  # rows that were skipped after they were read
        self._within: int | None = None  # the source whose document is not at its end
        self.seen = Counts()
        self._pass, self._ended = 0, [False] * len(sources)  # which sources have ended since the pass began
        self.hold_out = JOINED.join(source.hold_out for source in self.parts)

    @property
    def position(self) -> dict[str, Any]:
        positions = [source.position for source in self.parts]
        skipped = self._skipped + sum(position["skipped"] for position in positions)
        turn = {"given": list(self._given), "within": self._within, "ended": list(self._ended)}
        return {"pass": self._pass, "sources": positions, "shares": [*self.shares.values()], "skipped": skipped} | turn

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        check_position(position, {"pass", "sources", "shares", "given", "within", "ended", "skipped"})
        if position["shares"] != (shares := [*self.shares.values()]):
            raise UserError(
                f"data: the run's sources have the shares {listed(map(str, position['shares']))} of the text, not "
                f"{listed(map(str, shares))}: pass the old weights, or --overwrite to start over"
            )
        for source, of_source in zip(self.parts, position["sources"], strict=True):
            source.position = of_source
        self._pass, self._ended = position["pass"], list(position["ended"])
        self._given, self._within = list(position["given"]), position["within"]
        self._skipped = position["skipped"] - sum(of_source["skipped"] for of_source in position["sources"])

    @property
    def revision(self) -> str:
        return JOINED.join(source.revision for source in self.parts)

    @property
    def left_out(self) -> dict[str, str]:
        both = self._sources.items()
        return {f"{name}/{file}": reason for name, source in both for file, reason in source.left_out.items()}

    @property
    def notes(self) -> list[str]:
        return [f"{name}: {note}" for name, source in self._sources.items() for note in source.notes]

    def chunks(self) -> Iterator[TextChunk]:
        return self._in_turn(lambda source: source.chunks(), forever=True)

    @property
    def parts(self) -> list[Source]:
        return [*self._sources.values()]

    def held_out(self) -> Iterator[TextChunk]:
        if self._evaluation is not None:
            return self._evaluation.read_for(*self.parts)
        return self._in_turn(lambda source: source.held_out(), forever=False)

    def _in_turn(self, opened: Callable[[Source], Iterator[TextChunk]], forever: bool) -> Iterator[TextChunk]:
        """Chunks of the sources in turn, until each has ended. `forever`: one that ends begins again."""
        sources, names, shares = self.parts, [*self._sources], [*self.shares.values()]
        streams, given = [opened(source) for source in sources], [True] * len(sources)
        while not all(self._ended):
            at = self._within
            if at is None:
                left = (i for i, ended in enumerate(self._ended) if forever or not ended)
                at = min(left, key=lambda i: self._given[i] / shares[i])
            chunk = next(streams[at], None)
            if chunk is None:
                if forever and not given[at]:
                    raise UserError(f"data: {names[at]} has nothing to train on: leave it out")
                self._ended[at], self._within, given[at] = True, None, False
                streams[at] = opened(sources[at]) if forever else streams[at]
                continue
            if not (forever and chunk.held_out) and chunk.part != CLOSING:
                given[at] = True
                self._given[at] += utf8_bytes(chunk.text)
            self._within = None if chunk.ends_document else at
            yield chunk._replace(repeated=sources[at].position["pass"] > 0)
        self._pass, self._ended = self._pass + 1, [False] * len(self._sources)

    @property
    def evaluations(self) -> list[Evaluation]:
        if self._evaluation is not None:
            return [self._evaluation]
        return [evaluation for source in self.parts for evaluation in source.evaluations]

    @property
    def files(self) -> list[Path]:
        return [file for source in self.parts for file in source.files]

    def has_file(self, pattern: str) -> bool:
        both = self._sources.items()
        return any(s.has_file(pattern.removeprefix(f"{n}/")) for n, s in both if pattern.startswith(f"{n}/"))

    def reports(self) -> list[SourceReport]:
        reports = [report for source in self.parts for report in source.reports()]
        for report in reports[1:]:
            report.is_repeated = self._evaluation is not None
        return reports

    def progress(self) -> float | None:
        """Passes of the source that has done the fewest."""
        passes = [source.progress() for source in self.parts]
        known = [done for done in passes if done is not None]
        return min(known) if len(known) == len(passes) else None


def holds_chats(source: Source) -> bool:
    """Whether the first row of a source, or of a part of a mixture, is a chat, or a prompt with its completion."""
    parts = source.parts if isinstance(source, Mixture) else [source]
    return any(not isinstance(first, str) for first in map(_first_text, parts))


def _first_text(source: Source) -> Text:
    position = source.position
    first = next(source.chunks(), None)
    source.position = position
    return "" if first is None else first.text
