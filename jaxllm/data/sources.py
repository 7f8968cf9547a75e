"""Where text comes from: the standard library, files, or the Hugging Face Hub. Each source keeps its position.

A source yields `TextChunk`s, of which every `HOLD_OUT`-th belongs to the evaluation set. Its `position` is a small JSON
value; a fresh source with this position continues there without reading what came before.
"""

import fnmatch
import glob
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from jaxllm.config import RunConfig
from jaxllm.data.fingerprint import Fingerprint, content_digest
from jaxllm.data.folder import DataFiles, described, find_data
from jaxllm.data.hub_retry import RetryPolicy, report_client_retries, transient_cause
from jaxllm.data.reading import Chat, NoText, Unreadable, kind_of, read_chunks, text_in, value_of, wanted_fields
from jaxllm.errors import UserError, listed, one_line, shown

HOLD_OUT = 20
"""One chunk in twenty is held out for evaluation."""

RUN_OF_CHUNKS = 8
"""Consecutive chunks that stay together where files are divided among shards."""

FILES = "files:"
"""How the fingerprint of files begins where a commit of the Hub could stand."""

TRIES = 3
"""How often a file is read at a place where it cannot be read, before it is left out."""

WAIT = 1.0
"""Seconds between these tries: a file server may be back."""


class TextChunk(NamedTuple):
    text: str | Chat
    ends_document: bool
    held_out: bool


class Source(Protocol):
    """An endless series of passes over a corpus."""

    @property
    def position(self) -> dict[str, Any]:
        """Where the next chunk starts, and `skipped`, the number of rows without text so far; JSON values.

        Setting a position that was taken from another corpus raises UserError.
        """
        ...

    @position.setter
    def position(self, position: dict[str, Any]) -> None: ...

    @property
    def revision(self) -> str:
        """What tells whether it is the same data: a commit of the Hub, or the fingerprint of files."""
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

    def progress(self) -> float | None:
        """Passes done, with a fraction; None where the size is not known."""
        ...


def open_source(config: RunConfig, shard: int = 0, num_shards: int = 1) -> Source:
    """The source that `config.data.source` names, or one of several disjoint shards of it.

    Raises:
        UserError: nothing can be read there.
    """
    data = config.data
    path = Path(data.source).expanduser()
    if data.source == "stdlib" or path.exists():
        if data.source == "stdlib":
            found = DataFiles(stdlib_files(Path(sysconfig.get_path("stdlib"))), {}, {})
        else:
            found = find_data(path, data.text_field, data.split)
        return FileSource(
            found.files,
            config.seed,
            data.text_field,
            shard,
            num_shards,
            data.skip_data,
            found.damaged,
            described(found.passed_over) + described({str(file): why for file, why in found.damaged.items()}),
        )
    if data.source.count("/") != 1 or data.source.startswith((".", "/", "~")) or kind_of(path) is not None:
        raise UserError(f"data is {data.source!r}: there is no such file or folder, and it is no Hub name (OWNER/NAME)")
    return HubSource(
        data.source,
        data.subset,
        data.split,
        data.text_field,
        shard,
        num_shards,
        None if is_fingerprint(data.revision) else data.revision,
    )


def is_fingerprint(revision: str | None) -> bool:
    """Whether the data are files, whose fingerprint stands in place of a commit."""
    return (revision or "").startswith(FILES)


def stdlib_files(root: Path) -> list[Path]:
    """The interpreter's own Python sources, without installed packages and tests.

    Also without `encodings`: its 1.5 MB of generated character tables read like nothing else.
    """
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]  # do not walk installed packages
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data is 'stdlib', but {root} holds no Python sources: pass --data FILE or --data FOLDER")
    return sorted(files)


def local_files(path: Path, text_field: str = "text") -> list[Path]:
    """The file itself, or the files below a folder that hold text, sorted.

    Raises:
        UserError: there is none.
    """
    return find_data(path, text_field, "train").files


class FileSource:
    """Files of text or rows, in an order that each pass shuffles.

    One of several shards has every n-th file of that order if there are enough files, or else runs of chunks of every
    file. A file that cannot be read, or not to its end, is left out from there on; so are those that `skip` names, with
    patterns separated by commas. They keep their place in the order: the position tells which they are.
    """

    def __init__(
        self,
        files: list[Path],
        seed: int,
        text_field: str,
        shard: int = 0,
        num_shards: int = 1,
        skip: str = "",
        damaged: dict[Path, str] | None = None,
        notes: list[str] | None = None,
    ):
        self._shard, self._num_shards = shard, num_shards
        self._seed, self._text_field = seed, text_field
        self._folder = Path(os.path.commonpath([file.parent for file in files]))
        here = {file.relative_to(self._folder).as_posix(): file for file in files}
        gone = [name for name in _patterns(skip) if not glob.has_magic(name) and not _matching(name, here)]
        self._names = sorted([*here, *gone], key=lambda name: self._folder / name)
        self._files = [self._folder / name for name in self._names]
        self._sizes = [size_of(file) for file in self._files]
        self._total = sum(self._sizes) or 1
        self._by_files = len(self._files) >= HOLD_OUT * num_shards
        self._digests = [content_digest(file, len(self._files)) for file in self._files]
        self._fingerprint = Fingerprint(self._names, self._digests)
        self.notes = list(notes or ())
        if skipped := _matching(skip, self._names):
            self.notes += described(dict.fromkeys(skipped, "--skip-data"))
        left_out = {file.relative_to(self._folder).as_posix(): reason for file, reason in (damaged or {}).items()}
        self._at: dict[str, Any] = self._start_of_pass(0, {"skipped": 0, "skip": skip, "left_out": left_out})

    @property
    def position(self) -> dict[str, Any]:
        return self._at | {"files": self._fingerprint.value}

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        check_position(position, {*self._at, "files"})
        skip = ",".join(dict.fromkeys((*_patterns(position["skip"]), *_patterns(self._at["skip"]))))
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
        at = self._at
        if (at["file"], at["chunk"]) == (0, 0):
            announce_pass(at["pass"], self._shard, self._num_shards)
        order = list(range(len(self._files)))
        random.Random(f"{self._seed}/{at['pass']}").shuffle(order)
        skipped = set(_matching(at["skip"], self._names))
        for number in range(at["file"], len(order)):
            index = order[number]
            name = self._names[index]
            mine = not self._by_files or number % self._num_shards == self._shard
            if mine and name not in skipped and name not in self.left_out:
                for chunk, text, ends in self._chunks_of(index):
                    if not self._by_files and (index + chunk // RUN_OF_CHUNKS) % self._num_shards != self._shard:
                        continue
                    # Held out by whole files where there are enough of them, by chunks of the files where not.
                    unit = index if len(order) >= HOLD_OUT else index + chunk
                    yield TextChunk(text, ends, held_out=unit % HOLD_OUT == 1)
            read = self._at["bytes"] + self._sizes[index]
            self._at = self._at | {"file": number + 1, "chunk": 0, "offset": 0, "bytes": read, "within": 0}
        if all(name in skipped or name in self.left_out for name in self._names):
            said = "; ".join([*described(self.left_out)[:3], *(["the rest by --skip-data"] if skipped else [])])
            raise UserError(f"data: every file of {str(self._folder)!r} is left out: {said}")
        kept = {name: self._at[name] for name in ("skipped", "skip", "left_out")}
        self._at = self._start_of_pass(self._at["pass"] + 1, kept)

    def progress(self) -> float:
        return self._at["pass"] + (self._at["bytes"] + self._at["within"]) / self._total

    @staticmethod
    def _start_of_pass(number: int, kept: dict[str, Any]) -> dict[str, Any]:
        """`chunk` and `offset` are where the file number `file` continues.

        `bytes`: of the files that are done; `within`: of the one that is being read.
        """
        return {"pass": number, "file": 0, "chunk": 0, "offset": 0, "bytes": 0, "within": 0} | kept

    def _chunks_of(self, index: int) -> Iterator[tuple[int, str | Chat, bool]]:
        """The chunks of a file from where the position is, each with its number; the position goes along.

        A file that cannot be read is tried `TRIES` times at one place, then left out.
        """
        file, name, size = self._files[index], self._names[index], self._sizes[index]
        counts = self._by_files or self._shard == 0  # else every shard reads each row without text, and one counts it
        tries, reason = 0, None
        while reason is None:
            try:
                self._check_unchanged(index)
                for read in read_chunks(file, size, self._at["offset"], self._text_field):
                    tries, chunk = 0, self._at["chunk"]
                    self._at = self._at | {"offset": read.offset, "within": read.done}
                    if read.text is None:
                        self._at["skipped"] += counts
                    else:
                        self._at["chunk"] += 1
                        yield chunk, read.text, read.ends_document
                return
            except (Unreadable, PermissionError) as error:
                tries += 1
                if isinstance(error, NoText) or tries == TRIES:
                    reason = one_line(error)
                else:
                    time.sleep(WAIT)
        if tries == TRIES:
            reason = f"{reason}; tried {TRIES} times, read up to {self._at['within']} of {size} bytes"
        self._at = self._at | {"left_out": self.left_out | {name: reason}}
        if counts:
            tqdm.write(f"Data: left out from here on: {described({name: reason})[0]}")
        if self._at["chunk"] and kind_of(file) == "text":
            yield self._at["chunk"], "", True  # the next file is another document

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


def _patterns(skip: str) -> list[str]:
    return [pattern for part in skip.split(",") if (pattern := part.strip())]


def _matching(skip: str, names: Iterable[str]) -> list[str]:
    """The names, or whose last parts, are or match one of some patterns."""
    patterns = _patterns(skip)
    return [
        name
        for name in names
        if any(part == p or fnmatch.fnmatchcase(part, p) for p in patterns for part in {name, name.rpartition("/")[2]})
    ]


class HubSource:
    """A streamed dataset of the Hugging Face Hub; rows come in the dataset's own order.

    One of several shards has its own files of the dataset if they divide evenly, or else every n-th row. It keeps one
    commit: the one it is given, or the newest one when it is opened.
    """

    def __init__(
        self,
        name: str,
        config: str | None,
        split: str,
        text_field: str,
        shard: int = 0,
        num_shards: int = 1,
        revision: str | None = None,
    ):
        self._shard, self._num_shards = shard, num_shards
        self._name, self._config, self._split, self._text_field = name, config, split, text_field
        self._retry = RetryPolicy(f"the dataset {name!r} on the Hub")
        if not hub_reachable():
            raise UserError(
                f"data: the Hugging Face Hub, for the dataset {name!r}, could not be reached: check the network, "
                "or pass --data FILE and --tokenizer FOLDER"
            )
        commit = revision or self._with_retries(self._newest_revision)
        self.position = {"pass": 0, "row": 0, "stream": None, "revision": commit, "skipped": 0}
        self._opened = self._with_retries(self._open)  # now: a wrong name is reported before anything slow
        self._retry.succeeded()
        names = self._opened.column_names
        self.notes: list[str] = []
        self.left_out: dict[str, str] = {}
        if names is not None and not {text_field.partition(".")[0], *wanted_fields(text_field)} & {*names}:
            raise UserError(f"data: {name!r} has no field {text_field!r}: pass --text-field, one of {listed(names)}")

    @property
    def position(self) -> dict[str, Any]:
        return self._at

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        check_position(position, {"pass", "row", "stream", "revision", "skipped"})
        self._at = position
        self._opened = None  # it may be of another commit, or partly read

    @property
    def revision(self) -> str:
        return self._at["revision"]

    def chunks(self) -> Iterator[TextChunk]:
        if self._at["row"] == 0:
            announce_pass(self._at["pass"], self._shard, self._num_shards)
        for row, stream_position in self._rows():
            number, text = self._at["row"], text_in(value_of(row, self._text_field))
            skipped = self._at["skipped"] + (text is None)
            self._at = self._at | {"row": number + 1, "stream": stream_position, "skipped": skipped}
            if text is not None:
                yield TextChunk(text, True, held_out=number % HOLD_OUT == 1)
        self._at = self._at | {"pass": self._at["pass"] + 1, "row": 0, "stream": None}

    def progress(self) -> None:
        return None

    def _rows(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The rest of the pass, each row with the stream's position after it.

        After a transient error the stream is opened again after the last row, so that no row is lost or repeated.
        """
        stream, self._opened = self._opened or self._with_retries(self._open), None
        while True:
            if self._at["stream"] is not None:
                stream.load_state_dict(self._at["stream"])
            try:
                for row in stream:
                    self._retry.succeeded()
                    yield row, stream.state_dict()
                return
            except Exception as error:  # the clients raise dozens of kinds, by cause and by version
                self._retry.wait(error)

    def _with_retries(self, ask: Callable[[], Any]) -> Any:
        """Call `ask` until it succeeds, as long as its errors are transient.

        Raises:
            UserError: an error is permanent.
        """
        while True:
            try:
                made = ask()
            except UserError:
                raise
            except Exception as error:
                if transient_cause(error) is None:
                    raise UserError(
                        f"data: the dataset {self._name!r} (config {self._config!r}, split {self._split!r}) could not "
                        f"be opened on the Hub ({one_line(error)}): check the names and the network, "
                        "or pass --data FILE"
                    ) from None
                self._retry.wait(error)
            else:
                return made

    def _newest_revision(self) -> str:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(self._name).sha)

    def _open(self):
        import datasets
        from datasets.distributed import split_dataset_by_node
        from huggingface_hub.errors import RevisionNotFoundError

        # `RetryPolicy` waits instead
        config: Any = datasets.config  # pyright: ignore[reportAttributeAccessIssue]
        config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
        for name in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
            setattr(config, f"STREAMING_{name}_RETRY_INTERVAL", 0)
        revision = self._at["revision"]
        try:
            # Not its own cache: if the Hub fails, `datasets` would use whatever commit was downloaded there before.
            with tempfile.TemporaryDirectory() as empty:
                stream = datasets.load_dataset(
                    self._name, self._config, split=self._split, streaming=True, revision=revision, cache_dir=empty
                )
        except Exception as error:
            if not isinstance(error.__cause__ or error.__context__, RevisionNotFoundError):
                raise
            raise UserError(
                f"data: the dataset {self._name!r} no longer has the commit {revision} that the run was started on: "
                "pass --overwrite to start over with its present state"
            ) from None
        if self._num_shards == 1:
            return stream
        return split_dataset_by_node(stream, rank=self._shard, world_size=self._num_shards)


def announce_pass(number: int, shard: int, num_shards: int) -> None:
    """Print that a pass over the data begins: each of the first ten, then every tenth, every hundredth and so on.

    The rows of the pass reach the batches later, through the pool.
    """
    if number > 0 and len(str(number + 1).rstrip("0")) == 1:
        tqdm.write(
            f"Pass {number + 1} over the data begins"
            + (f" in shard {shard + 1} of {num_shards}" if num_shards > 1 else "")
        )


def check_position(position: dict[str, Any], names: set[str]) -> None:
    """Check that a data position has the keys of such a source.

    Raises:
        UserError: it was taken from another kind of data, or by an earlier version.
    """
    if position.keys() != names:
        raise UserError(
            f"the run's data position has {', '.join(sorted(position))} where {', '.join(sorted(names))} are expected: "
            "it is of other data or of an earlier version; pass the old data, or --overwrite to start over"
        )


def hub_reachable() -> bool:
    """Whether the Hub answers at all.

    Checked once before its clients are used: without a network they retry for half a minute per file.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    report_client_retries()
    try:
        get_session().head(constants.ENDPOINT)
    except Exception:  # the HTTP library's own kinds, or the client's where HF_HUB_OFFLINE is set
        return False
    return True
