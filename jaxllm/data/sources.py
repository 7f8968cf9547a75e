"""Where text comes from: the standard library, files, or the Hugging Face Hub. Each source keeps its position.

A source yields `TextChunk`s, of which every `HOLD_OUT`-th belongs to the evaluation set. Its `position` is a small JSON
value; a fresh source with this position continues there without reading what came before.
"""

import os
import random
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from jaxllm.config import RunConfig
from jaxllm.data.fingerprint import Fingerprint
from jaxllm.data.hub_retry import RetryPolicy, report_client_retries, transient_cause
from jaxllm.data.reading import SUFFIXES, read_chunks, text_in
from jaxllm.errors import UserError, listed, one_line

HOLD_OUT = 20
"""One chunk in twenty is held out for evaluation."""

RUN_OF_CHUNKS = 8
"""Consecutive chunks that stay together where files are divided among shards."""


class TextChunk(NamedTuple):
    text: str
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
    if config.data.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return FileSource(stdlib_files(root), config.seed, config.data.text_field, shard, num_shards)
    path = Path(config.data.source).expanduser()
    if path.exists():
        return FileSource(local_files(path), config.seed, config.data.text_field, shard, num_shards)
    if config.data.source.count("/") != 1 or config.data.source.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise UserError(
            f"data is {config.data.source!r}: there is no such file or folder, and it is no Hub name (OWNER/NAME)"
        )
    return HubSource(
        config.data.source,
        config.data.subset,
        config.data.split,
        config.data.text_field,
        shard,
        num_shards,
        config.data.revision,
    )


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
    """Text, JSONL and parquet files, in an order that each pass shuffles.

    One of several shards has every n-th file of that order if there are enough files, or else runs of chunks of every
    file.
    """

    def __init__(self, files: list[Path], seed: int, text_field: str, shard: int = 0, num_shards: int = 1):
        self._shard, self._num_shards = shard, num_shards
        self._files, self._seed, self._text_field = files, seed, text_field
        sizes = [file.stat().st_size for file in files]
        self._total = sum(sizes)
        self._by_files = len(files) >= HOLD_OUT * num_shards
        self._sizes = dict(zip(files, sizes, strict=True))
        self._fingerprint = Fingerprint(files, sizes)
        self._at = self._start_of_pass(0, skipped=0)

    @property
    def position(self) -> dict[str, Any]:
        return self._at | {"files": self._fingerprint.value}

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        check_position(position, {*self._at, "files"})
        self._fingerprint.check(position["files"])
        self._at = {name: position[name] for name in self._at}

    def chunks(self) -> Iterator[TextChunk]:
        at = self._at
        if (at["file"], at["chunk"]) == (0, 0):
            announce_pass(at["pass"], self._shard, self._num_shards)
        order = list(range(len(self._files)))
        random.Random(f"{self._seed}/{at['pass']}").shuffle(order)
        for number in range(at["file"], len(order)):
            index = order[number]
            file = self._files[index]
            if not self._by_files or number % self._num_shards == self._shard:
                for chunk, text, ends in self._chunks_of(file):
                    if not self._by_files and (index + chunk // RUN_OF_CHUNKS) % self._num_shards != self._shard:
                        continue
                    # Held out by whole files where there are enough of them, by chunks of the files where not.
                    unit = index if len(order) >= HOLD_OUT else index + chunk
                    yield TextChunk(text, ends, held_out=unit % HOLD_OUT == 1)
            read = self._at["bytes"] + self._sizes[file]
            self._at = self._at | {"file": number + 1, "chunk": 0, "offset": 0, "bytes": read, "within": 0}
        self._at = self._start_of_pass(self._at["pass"] + 1, self._at["skipped"])

    def progress(self) -> float:
        return self._at["pass"] + (self._at["bytes"] + self._at["within"]) / self._total

    @staticmethod
    def _start_of_pass(number: int, skipped: int) -> dict[str, Any]:
        """`chunk` and `offset` are where the file number `file` continues.

        `bytes`: of the files that are done; `within`: of the one that is being read.
        """
        return {"pass": number, "file": 0, "chunk": 0, "offset": 0, "bytes": 0, "within": 0, "skipped": skipped}

    def _chunks_of(self, file: Path) -> Iterator[tuple[int, str, bool]]:
        """The chunks of a file from where the position is, each with its number; the position goes along."""
        counts = self._by_files or self._shard == 0  # else every shard reads each row without text, and one counts it
        for read in read_chunks(file, self._sizes[file], self._at["offset"], self._text_field):
            chunk = self._at["chunk"]
            self._at = self._at | {"offset": read.offset, "within": read.done}
            if read.text is None:
                self._at["skipped"] += counts
            else:
                self._at["chunk"] += 1
                yield chunk, read.text, read.ends_document
        if self._at["chunk"] == 0 and SUFFIXES[file.suffix] != "text":  # an empty text is one
            raise UserError(f"data: no row of {file} has a text in the field {self._text_field!r}: pass --text-field")


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
        revision = revision or self._with_retries(self._newest_revision)
        self.position = {"pass": 0, "row": 0, "stream": None, "revision": revision, "skipped": 0}
        self._opened = self._with_retries(self._open)  # now: a wrong name is reported before anything slow
        self._retry.succeeded()
        names = self._opened.column_names
        if names is not None and text_field not in names:
            raise UserError(f"data: {name!r} has no field {text_field!r}: pass --text-field, one of {listed(names)}")

    @property
    def position(self) -> dict[str, Any]:
        return self._at

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        check_position(position, {"pass", "row", "stream", "revision", "skipped"})
        self._at = position
        self._opened = None  # it may be of another commit, or partly read

    def chunks(self) -> Iterator[TextChunk]:
        if self._at["row"] == 0:
            announce_pass(self._at["pass"], self._shard, self._num_shards)
        for row, stream_position in self._rows():
            number, text = self._at["row"], text_in(row.get(self._text_field))
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
