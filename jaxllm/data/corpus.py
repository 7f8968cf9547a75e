"""Where text comes from: the standard library, files, or the Hugging Face Hub. Each source keeps its position.

A source yields `Piece`s: runs of text, of which every `HOLD_OUT`-th belongs to the evaluation set. Its `position` is a
small JSON value; setting it on a fresh source goes on from there without reading what came before.
"""

from __future__ import annotations

import json
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxllm.config import TrainConfig
from jaxllm.errors import UserError

HOLD_OUT = 20
"""One piece in twenty is held out for evaluation."""

PIECE_CHARS = 4096
"""A text file is read in pieces of at most this size, so that a file of any size fits in memory."""

RUN_OF_PIECES = 8
"""Pieces that follow one another stay together where files are divided among parts."""

SUFFIXES = {".txt": "text", ".md": "text", ".py": "text", ".text": "text", ".jsonl": "jsonl", ".parquet": "parquet"}


class Piece(NamedTuple):
    text: str
    ends_document: bool
    held_out: bool


class Source(Protocol):
    """An endless series of passes over a corpus."""

    position: dict[str, Any]
    """Where the next piece starts; JSON values only."""

    skipped_rows: int
    """Rows passed over because they held no text."""

    def pieces(self) -> Iterator[Piece]:
        """Pieces from `position` to the end of the pass; afterwards `position` is the start of the next pass."""
        ...

    def progress(self) -> float | None:
        """Passes done, with a fraction; None where the size is not known."""
        ...


def open_source(config: TrainConfig, part: int = 0, parts: int = 1) -> Source:
    """The source that `config.data` names, or one of several parts of it, which have nothing in common.

    Raises:
        UserError: nothing can be read there.
    """
    if config.data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return FileSource(stdlib_files(root), config.seed, config.text_field, part, parts)
    path = Path(config.data).expanduser()
    if path.exists():
        return FileSource(local_files(path), config.seed, config.text_field, part, parts)
    if config.data.count("/") != 1 or config.data.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise UserError(f"data is {config.data!r}: there is no such file or folder, and it is no Hub name (OWNER/NAME)")
    return HubSource(config.data, config.data_config, config.data_split, config.text_field, part, parts)


def stdlib_files(root: Path) -> list[Path]:
    """The interpreter's own Python sources, without installed packages and tests.

    Also without `encodings`: its 1.5 MB of generated character tables read like nothing else.
    """
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]  # installed packages are a long walk
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data is 'stdlib', but {root} holds no Python sources: pass --data FILE or --data FOLDER")
    return sorted(files)


def local_files(path: Path) -> list[Path]:
    """The file itself, or the readable files below a folder, sorted.

    Raises:
        UserError: there is none, or one of an unknown kind was named.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"data is {str(path)!r}: the ending must be one of {', '.join(SUFFIXES)}")
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"data is {str(path)!r}: the folder holds no file ending in {', '.join(SUFFIXES)}")
    for file in files:
        try:
            with file.open("rb") as opened:
                opened.read(1)
        except OSError as error:
            raise UserError(f"data: cannot read {file}: {error.strerror}") from None
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise UserError(f"data is {str(path)!r}: it is empty")
    return files


class FileSource:
    """Text, JSONL and parquet files, in an order that each pass shuffles anew.

    A part of several has every so-many-th file of that order where there are enough of them, or else runs of pieces of
    every file.
    """

    def __init__(self, files: list[Path], seed: int, text_field: str, part: int = 0, parts: int = 1):
        self._part, self._parts = part, parts
        self._files, self._seed, self._text_field = files, seed, text_field
        sizes = [file.stat().st_size for file in files]
        self._total = sum(sizes)
        self._by_files = len(files) >= HOLD_OUT * parts
        self._sizes = dict(zip(files, sizes, strict=True))
        self.position: dict[str, Any] = self._start_of_pass(0)
        self.skipped_rows = 0

    def pieces(self) -> Iterator[Piece]:
        order = list(range(len(self._files)))
        random.Random(f"{self._seed}/{self.position['pass']}").shuffle(order)
        for number in range(self.position["file"], len(order)):
            index = order[number]
            file = self._files[index]
            start = self.position["piece"]
            if self._by_files and number % self._parts != self._part:
                self.position |= {"file": number + 1, "bytes": self.position["bytes"] + self._sizes[file]}
                continue
            for piece, (text, ends) in enumerate(self._read(file)):
                if piece < start:
                    continue
                within = min(self.position["within"] + len(text.encode()), self._sizes[file])
                self.position |= {"piece": piece + 1, "within": within}
                if not self._by_files and (index + piece // RUN_OF_PIECES) % self._parts != self._part:
                    continue
                # Held out by whole files where there are enough of them, by pieces of the files where not.
                unit = index if len(order) >= HOLD_OUT else index + piece
                yield Piece(text, ends, held_out=unit % HOLD_OUT == 1)
            read = self.position["bytes"] + self._sizes[file]
            self.position |= {"file": number + 1, "piece": 0, "bytes": read, "within": 0}
        self.position = self._start_of_pass(self.position["pass"] + 1)

    def progress(self) -> float:
        return self.position["pass"] + (self.position["bytes"] + self.position["within"]) / self._total

    @staticmethod
    def _start_of_pass(number: int) -> dict[str, Any]:
        """`bytes`: of the files that are done; `within`: of the one that is being read, by the size of its text."""
        return {"pass": number, "file": 0, "piece": 0, "bytes": 0, "within": 0}

    def _read(self, file: Path) -> Iterator[tuple[str, bool]]:
        kind = SUFFIXES[file.suffix]
        try:
            if kind == "text":
                yield from _text_pieces(file)
            elif kind == "jsonl":
                yield from self._rows(file, _jsonl_rows(file))
            else:
                yield from self._rows(file, _parquet_rows(file, self._text_field))
        except OSError as error:
            raise UserError(f"data: cannot read {file}: {one_line(error)}") from None

    def _rows(self, file: Path, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[str, bool]]:
        seen = False
        for row in rows:
            text = row.get(self._text_field)
            if isinstance(text, str) and text:
                seen = True
                yield valid_unicode(text), True
            elif self._by_files or self._part == 0:  # else every part meets it, and one counts
                self.skipped_rows += 1
        if not seen:
            raise UserError(f"data: no row of {file} has a text in the field {self._text_field!r}: pass --text-field")


def _text_pieces(file: Path) -> Iterator[tuple[str, bool]]:
    """A text file in pieces that end at line ends; bytes that are not UTF-8 become U+FFFD."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        piece = ""
        while line := lines.readline(PIECE_CHARS):
            if piece and len(piece) + len(line) > PIECE_CHARS:
                yield piece, False
                piece = ""
            piece += line
    if piece:
        yield piece, True


def _jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else {}


def _parquet_rows(file: Path, field: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        if field not in names:
            raise UserError(f"data: {file} has no field {field!r}: pass --text-field, one of {', '.join(names)}")
        for batch in parquet.iter_batches(1024, columns=[field]):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"data: {file} is no parquet file: {one_line(error)}") from None


class HubSource:
    """A streamed dataset of the Hugging Face Hub; rows come in the dataset's own order.

    A part of several has its own shards where they divide evenly, or else every so-many-th row.
    """

    def __init__(self, name: str, config: str | None, split: str, text_field: str, part: int = 0, parts: int = 1):
        self._part, self._parts = part, parts
        self._name, self._config, self._split, self._text_field = name, config, split, text_field
        self._opened = self._open()  # now, so that a wrong name is said before anything slow starts
        names = self._opened.column_names
        if names is not None and text_field not in names:
            raise UserError(f"data: {name!r} has no field {text_field!r}: pass --text-field, one of {', '.join(names)}")
        self.position: dict[str, Any] = {"pass": 0, "row": 0, "stream": None}
        self.skipped_rows = 0

    def pieces(self) -> Iterator[Piece]:
        stream, self._opened = self._opened or self._open(), None
        if self.position["stream"] is not None:
            stream.load_state_dict(self.position["stream"])
        for row in stream:
            number = self.position["row"]
            self.position = {"pass": self.position["pass"], "row": number + 1, "stream": stream.state_dict()}
            text = row.get(self._text_field)
            if isinstance(text, str) and text:
                yield Piece(valid_unicode(text), True, held_out=number % HOLD_OUT == 1)
            else:
                self.skipped_rows += 1
        self.position = {"pass": self.position["pass"] + 1, "row": 0, "stream": None}

    def progress(self) -> None:
        return None

    def _open(self):
        import datasets
        from datasets.distributed import split_dataset_by_node

        if not hub_reachable():
            raise UserError(
                f"data: the Hugging Face Hub, for the dataset {self._name!r}, could not be reached: check the network, "
                "or pass --data FILE and --tokenizer FOLDER"
            )
        try:
            stream = datasets.load_dataset(self._name, self._config, split=self._split, streaming=True)
            if self._parts == 1:
                return stream
            return split_dataset_by_node(stream, rank=self._part, world_size=self._parts)
        except Exception as error:  # the client raises dozens of kinds, by cause and by version
            raise UserError(
                f"data: the dataset {self._name!r} (config {self._config!r}, split {self._split!r}) could not be "
                f"opened on the Hub ({one_line(error)}): check the names and the network, or pass --data FILE"
            ) from None


def hub_reachable() -> bool:
    """Whether the Hub answers at all.

    Asked once before its clients are used: they retry for half a minute per file where there is no network. In the
    middle of a run their patience is right, and stays.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the HTTP library's own kinds, or the client's where HF_HUB_OFFLINE is set
        return False
    return True


def valid_unicode(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes: they become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def one_line(error: Exception) -> str:
    """The first line of an error, shortened: for a message of one line."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
