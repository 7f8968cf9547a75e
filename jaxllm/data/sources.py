"""Where text comes from: the standard library, files, or the Hugging Face Hub. Each source keeps its position.

A source yields `TextChunk`s, of which every `HOLD_OUT`-th belongs to the evaluation set. Its `position` is a small JSON
value; a fresh source with this position continues there without reading what came before.
"""

import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.data.file_source import FILES, FileSource
from jaxllm.data.folder import DataFiles, find_data
from jaxllm.data.hub_retry import RetryPolicy, report_client_retries, transient_cause
from jaxllm.data.lines import kind_of
from jaxllm.data.rows import text_in, value_of, wanted_fields
from jaxllm.data.source import HOLD_OUT, Source, TextChunk, announce_pass, check_position
from jaxllm.errors import UserError, listed, one_line


def open_source(config: RunConfig, shard: int = 0, num_shards: int = 1) -> Source:
    """The source that `config.data.source` names, or one of several disjoint shards of it.

    Raises:
        UserError: nothing can be read there.
    """
    data = config.data
    path = Path(data.source).expanduser()
    if data.source == "stdlib" or path.exists():
        if data.source == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            found = DataFiles(root, stdlib_files(root), {}, {})
        else:
            found = find_data(path, data.text_field, data.split)
        return FileSource(found.files, config.seed, data.text_field, shard, num_shards, data.skip_data, found)
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
