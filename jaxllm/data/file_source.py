"""Text from files, in an order that each pass shuffles; what cannot be read is left out."""

import contextlib
import fnmatch
import glob
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxllm.config.groups import DataConfig
from jaxllm.data.chats import Text
from jaxllm.data.fingerprint import Fingerprint, content_digest
from jaxllm.data.folder import DataFiles, described
from jaxllm.data.lines import COMPRESSIONS, NoText, Unreadable, ending_of, kind_of
from jaxllm.data.reading import CHUNK_CHARS, FileChunk, read_chunks, rows_in
from jaxllm.data.report import Counts, Kind, SourceReport, counted
from jaxllm.data.source import CLOSING, HOLD_OUT, WHOLE, Evaluation, Shard, TextChunk, check_position, utf8_bytes
from jaxllm.errors import UserError, listed, one_line, shown

COUNTED = 2**20
"""Most bytes of text of which the share of held-out chunks is counted; of more, the report names the rule."""

RUN_OF_CHUNKS = 8
"""Consecutive chunks that stay together where files are divided among shards."""

FILES = "files:"
"""Prefix of a fingerprint of files, where a commit of the Hub could stand."""

TRIES = 3
"""Attempts to read a file at one place before it is left out."""

WAIT = 1.0
"""Seconds between these attempts: a file server may be back by then."""

HELD_OUT_SHARE = (1 / (2 * HOLD_OUT), 2 / HOLD_OUT)
"""Smallest and largest share of the bytes with which whole files are held out."""

LONGEST_HELD_OUT = (HOLD_OUT, 4 * CHUNK_CHARS)
"""A row is never held out if it is larger than 1/n of the corpus and than so many bytes: (n, bytes)."""


class FileSource:
    """Files of text or rows, in an order that each pass shuffles.

    One of several shards has every n-th file of that order if there are enough files, or else runs of chunks of every
    file. A file that cannot be read, or not to its end, is left out from there on; so are those that `data.skip_data`
    names. They keep their place in the order, by which a position refers to files.
    """

    def __init__(
        self, found: DataFiles, data: DataConfig, seed: int, shard: Shard = WHOLE, evaluation: Evaluation | None = None
    ):
        """Without a `data.hold_out`, whole files are held out where they hold their share of the bytes, else chunks."""
        self._data, self._seed, self._shard = data, seed, shard
        self._folder, self._splits = found.folder, found.splits
        self._present = [*found.files, *found.passed_over]
        skip = data.skip_data
        gone = [name for name in patterns_in(skip) if not glob.has_magic(name) and not _matching(name, found.files)]
        self._names = sorted([*found.files, *gone], key=lambda name: self._folder / name)
        self._files = [self._folder / name for name in self._names]
        self._sizes = [size_of(file) for file in self._files]
        self._total = sum(self._sizes) or 1
        self._by_files = len(self._files) >= HOLD_OUT * shard.of
        self.hold_out = data.hold_out or self._fitting_hold_out()
        self._whole_files = self.hold_out == "files" or (self.hold_out == "count" and len(self._files) >= HOLD_OUT)
        self.evaluations = [evaluation] if evaluation is not None else []
        self.seen = Counts()
        self._damaged: set[str] = set()  # files whose damaged rows were named
        self._strict = self.hold_out != "count"
        left_out = dict(found.damaged)
        skipped = dict.fromkeys(_matching(skip, self._names), "--skip-data")
        self._digests = [
            "" if name in {**skipped, **left_out} else content_digest(file, len(self._files))
            for name, file in zip(self._names, self._files, strict=True)
        ]
        self._fingerprint = Fingerprint(self._names, self._digests)
        self.notes = [*described(found.passed_over | skipped | left_out), *found.missing]
        self._at: dict[str, Any] = self._start_of_pass(0, {"skipped": 0, "skip": skip, "left_out": left_out})

    @property
    def position(self) -> dict[str, Any]:
        return self._at | {"files": self._fingerprint.value}

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        check_position(position, {*self._at, "files"})
        skip = ",".join(patterns_in(f"{position['skip']},{self._at['skip']}"))
        left_out = position["left_out"] | self._at["left_out"]
        if gone := left_out.keys() - {*self._names}:
            raise UserError(
                f"data: {listed(sorted(gone))} of {str(self._folder)!r} was left out before and is no longer there: "
                f"pass --skip-data {shown(','.join(sorted(gone)))[1:-1]}"
            )
        self._fingerprint.check(position["files"], {*left_out, *_matching(skip, self._names)}, self._folder)
        self._at = {name: position[name] for name in self._at} | {"skip": skip, "left_out": left_out}

    @property
    def revision(self) -> str:
        return FILES + self._fingerprint.value["all"]

    @property
    def left_out(self) -> dict[str, str]:
        return self._at["left_out"]

    def chunks(self) -> Iterator[TextChunk]:
        return self._pass(only_held_out=False)

    def held_out(self) -> Iterator[TextChunk]:
        if self.evaluations:
            return self.evaluations[0].read_for(self)
        return (chunk for chunk in self._pass(only_held_out=True) if chunk.held_out)

    def _pass(self, only_held_out: bool) -> Iterator[TextChunk]:
        """The rest of a pass, or its held-out files where whole files are held out."""
        at = self._at
        order = list(range(len(self._files)))
        random.Random(f"{self._seed}/{at['pass']}").shuffle(order)
        skipped = set(_matching(at["skip"], self._names))
        for number in range(at["file"], len(order)):
            index = order[number]
            name = self._names[index]
            mine = not self._by_files or number % self._shard.of == self._shard.number
            is_open = False  # whether its document stays open: the last chunk is read elsewhere
            mine = mine and not (only_held_out and self._whole_files and index % HOLD_OUT != 1)
            if mine and name not in skipped and name not in self.left_out:
                is_text = kind_of(self._files[index]) == "text"
                for chunk, text, ends in self._chunks_of(index):
                    if not self._has_chunk(index, chunk):
                        continue
                    yield TextChunk(text, ends, self._is_held_out(index, chunk, text), chunk if is_text else 0)
                if is_text and self._strict and (last := self._at["chunk"] - 1) >= 0:
                    is_elsewhere = self._is_held_out(index, last, "") != only_held_out and not self._whole_files
                    is_elsewhere = is_elsewhere or not self._has_chunk(index, last)
                    is_open = name in self.left_out or (last > 0 and is_elsewhere)
            read = self._at["bytes"] + self._sizes[index]
            self._at = self._at | {"file": number + 1, "chunk": 0, "offset": 0, "bytes": read, "within": 0}
            if is_open:
                yield TextChunk("", True, only_held_out, CLOSING)
        if all(name in skipped or name in self.left_out for name in self._names):
            by_option = ["the rest by --skip-data" if self.left_out else "by --skip-data"] if skipped else []
            said = "; ".join([*described(self.left_out)[:3], *by_option])
            raise UserError(f"data: every file of {str(self._folder)!r} is left out: {said}")
        kept = {name: self._at[name] for name in ("skipped", "skip", "left_out")}
        self._at = self._start_of_pass(self._at["pass"] + 1, kept)

    def _has_chunk(self, index: int, chunk: int) -> bool:
        """Whether a chunk of a file belongs to this shard."""
        return self._by_files or (index + chunk // RUN_OF_CHUNKS) % self._shard.of == self._shard.number

    def _fitting_hold_out(self) -> str:
        least, most = HELD_OUT_SHARE
        fits = len(self._files) >= HOLD_OUT and least <= sum(self._sizes[1::HOLD_OUT]) / self._total <= most
        return "files" if fits else "chunks"

    def _is_held_out(self, index: int, chunk: int, text: Text) -> bool:
        if self._whole_files:
            return index % HOLD_OUT == 1
        if self.hold_out == "nothing" or (index + chunk) % HOLD_OUT != 1:
            return False
        parts, longest = LONGEST_HELD_OUT
        return self.hold_out == "count" or utf8_bytes(text) <= max(self._total / parts, longest)

    @property
    def files(self) -> list[Path]:
        return [file for file, digest in zip(self._files, self._digests, strict=True) if digest]

    def has_file(self, pattern: str) -> bool:
        return any(is_skipped(pattern, name) for name in self._present)

    def reports(self) -> list[SourceReport]:
        kinds: dict[str, Kind] = {}
        read = [i for i, digest in enumerate(self._digests) if digest]  # not those that are left out
        for i in read:
            kind = kinds.setdefault(ending_of(self._files[i]), Kind())
            form = kind_of(self._files[i])
            kind.is_text = form == "text"
            kind.is_packed = form in ("arrow", "json") or self._files[i].suffix.lower() in COMPRESSIONS
            kind.files += 1
            kind.bytes += self._sizes[i]
            if (rows := rows_in(self._files[i])) is not None:
                kind.rows = (kind.rows or 0) + rows
        share, said = None, "nothing is held out"
        if self._whole_files:
            held_out = [self._sizes[i] for i in read if i % HOLD_OUT == 1]
            share = sum(held_out) / max(1, sum(self._sizes[i] for i in read))
            said = f"held out: {counted(len(held_out), 'whole file')}, {100 * share:.1f} % of the bytes"
        elif self.hold_out != "nothing":
            share = self._share_of_chunks(read) if sum(self._sizes[i] for i in read) <= COUNTED else None
            said = f"held out: one chunk in {HOLD_OUT}" + (
                "" if share is None else f", {100 * share:.1f} % of the text"
            )
        if self.evaluations:
            said = f"evaluated on {self.evaluations[0].name}; {said}"
        where = (self._data.source, kinds, self._data.split, dict(self._splits), said, share, self.seen)
        return [SourceReport(*where, is_sampled=not self.evaluations)]

    def _share_of_chunks(self, files: list[int]) -> float | None:
        """The share of the text that is held out, found by reading it; None: the text has more than `COUNTED` bytes."""
        whole = held_out = 0
        for index in files:
            with contextlib.suppress(Unreadable, PermissionError):  # reported when a pass reads them
                rows = read_chunks(self._files[index], self._sizes[index], 0, self._data.text_field, self._strict)
                for chunk, text in enumerate(row.text for row in rows if row.text is not None):
                    whole += utf8_bytes(text)
                    held_out += utf8_bytes(text) if self._is_held_out(index, chunk, text) else 0
                    if whole > COUNTED:
                        return None
        return held_out / max(1, whole)

    def progress(self) -> float:
        return self._at["pass"] + (self._at["bytes"] + self._at["within"]) / self._total

    @staticmethod
    def _start_of_pass(number: int, kept: dict[str, Any]) -> dict[str, Any]:
        """`chunk` and `offset` are where the file number `file` continues.

        `bytes`: of the files that are done; `within`: of the one that is being read.
        """
        return {"pass": number, "file": 0, "chunk": 0, "offset": 0, "bytes": 0, "within": 0} | kept

    def _chunks_of(self, index: int) -> Iterator[tuple[int, Text, bool]]:
        """The chunks of a file from the position on, each with its number; the position moves with them.

        A file that cannot be read is tried `TRIES` times at one place, then left out.
        """
        file, name, size = self._files[index], self._names[index], self._sizes[index]
        # without files of its own, every shard reads each row without text, and one counts it
        counts = self._by_files or self._shard.number == 0
        tries, reason = 0, None
        while reason is None:
            try:
                self._check_unchanged(index)
                for read in read_chunks(file, size, self._at["offset"], self._data.text_field, self._strict):
                    tries, chunk = 0, self._at["chunk"]
                    self.seen.file_bytes += read.done - self._at["within"]
                    self._at = self._at | {"offset": read.offset, "within": read.done}
                    if read.text is None:
                        self._at["skipped"] += counts and self._at["pass"] == 0  # later passes skip the same rows
                        self.seen.skipped_rows += counts
                        self.seen.other_parts += counts and read.other_part
                        if read.damage and counts:
                            self._report_damage(name, read)
                    else:
                        self._at["chunk"] += 1
                        self.seen.add(utf8_bytes(read.text), read.ends_document)
                        yield chunk, read.text, read.ends_document
                return
            except (Unreadable, PermissionError) as error:
                tries += 1
                if isinstance(error, NoText) or tries == TRIES:
                    reason = one_line(error)
                else:
                    time.sleep(WAIT)
        if not self._folder.is_dir():  # not one file's fault: a disk or a file server is missing
            raise UserError(
                f"data: the folder {str(self._folder)!r} is gone: restore it and run the same command again; the "
                "run resumes from its last checkpoint"
            )
        if tries == TRIES:
            reason = f"{reason}; tried {TRIES} times, read up to {self._at['within']} of {size} bytes"
        self._at = self._at | {"left_out": self.left_out | {name: reason}}
        if counts:
            tqdm.write(f"Data: left out from here on: {described({name: reason})[0]}")
        if self._at["chunk"] and kind_of(file) == "text" and not self._strict:
            yield self._at["chunk"], "", True  # the next file is another document

    def _report_damage(self, name: str, read: FileChunk) -> None:
        """Print the first damaged row of a file; the others are counted."""
        if name not in self._damaged:
            self._damaged.add(name)
            what = "parts that are not text" if read.other_part else "damage"
            tqdm.write(
                f"Data: {name}: rows with {what} are skipped and counted; the first, before byte or row {read.offset}: "
                f"{read.damage}"
            )

    def _check_unchanged(self, index: int) -> None:
        file, size = self._files[index], self._sizes[index]
        if content_digest(file, len(self._files)) != self._digests[index]:
            now = size_of(file)
            change = f"{size} bytes, now {now}" if now != size else "another content"
            raise Unreadable(f"it has changed since the run began to read it ({change})")


def size_of(file: Path) -> int:
    """A file's bytes; 0 where it is gone."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def is_skipped(skip: str, name: str) -> bool:
    """Whether `skip`, patterns separated by commas, names a file."""
    return bool(_matching(skip, [name]))


def patterns_in(skip: str) -> list[str]:
    """Names and patterns that are separated by commas, each once."""
    return list(dict.fromkeys(pattern for part in skip.split(",") if (pattern := part.strip())))


def _matching(skip: str, names: Iterable[str]) -> list[str]:
    """The names that match one of some patterns, or whose last part does."""
    patterns = patterns_in(skip)
    return [
        name
        for name in names
        if any(part == p or fnmatch.fnmatchcase(part, p) for p in patterns for part in {name, name.rpartition("/")[2]})
    ]
