"""Where text comes from: the standard library, files, or the Hugging Face Hub. Each source keeps its position.

A source yields `TextChunk`s, of which every `HOLD_OUT`-th belongs to the evaluation set. Its `position` is a small JSON
value; a fresh source with this position continues there without reading what came before.
"""

import functools
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data.chats import OtherPart, form_in, one_sided, other_side, text_in, without_text
from jaxllm.data.file_source import FILES, FileSource, is_skipped
from jaxllm.data.folder import DataFiles, check_split, find_data
from jaxllm.data.hub_retry import RetryPolicy, bound_requests, configure_clients, transient_cause
from jaxllm.data.lines import kind_of
from jaxllm.data.mixture import JOINED, Mixture, weighted
from jaxllm.data.report import Counts, SourceReport
from jaxllm.data.source import AS_FOUND, HOLD_OUT, Evaluation, Reading, Source, TextChunk, check_position, utf8_bytes
from jaxllm.data.splits import ALL, VALIDATION
from jaxllm.errors import UserError, listed, one_line, shown


def open_source(config: RunConfig, shard: int = 0, num_shards: int = 1) -> Source:
    """The source that `config.data.source` names, or one of several disjoint shards of it.

    Raises:
        UserError: nothing can be read there, or an option does not apply to it.
    """
    data = config.data
    weights = {} if Path(data.source).expanduser().exists() else weighted(data.source)
    evaluation = None
    if data.eval_data is not None:
        evaluated = config.with_options(**_evaluated(data))
        evaluation = Evaluation(
            data.eval_data, functools.partial(_open_evaluated, evaluated, data.eval_data, *(shard, num_shards))
        )
    if not weights:
        return _with_rows(_open_one(config, shard, num_shards, evaluation), data)
    parts = _parts(data, list(weights))
    sources = {
        name: _open_one(config.with_options(**part), shard, num_shards, evaluation) for name, part in parts.items()
    }
    return _with_rows(Mixture(sources, weights, evaluation), data)


def _open_evaluated(config: RunConfig, name: str, shard: int, num_shards: int) -> Source:
    try:
        return open_source(config, shard, num_shards)
    except UserError as error:
        raise UserError(f"eval_data is {name!r}: {error}") from None


def _with_rows(source: Source, data: DataConfig) -> Source:
    """Check that a field is named only where there are rows; text that is evaluated may have none."""
    is_named = data.text_field != "text" and data.hold_out not in ("count", "nothing")
    if is_named and source.files and all(kind_of(file) == "text" for file in source.files):
        raise UserError(f"text_field is {shown(data.text_field)}: {data.source!r} has only text, no rows; leave it out")
    return source


def _evaluated(data: DataConfig) -> dict[str, Any]:
    """The options of the data that --eval-data names, all of which is evaluated."""
    assert data.eval_data is not None
    other = {"eval_data": None, "hold_out": "nothing", "skip_data": ""}
    name = data.eval_data
    if name == "stdlib" or Path(name).expanduser().exists():
        return other | {"data": name, "data_revision": None, "data_config": None, "data_split": ALL}
    if "/" in name or kind_of(Path(name)) is not None:
        raise UserError(f"eval_data is {name!r}: there is no such file or folder, and no split of that name")
    if name == data.split:
        raise UserError(f"eval_data is {name!r}: that split is trained on; pass another split, a file or a folder")
    return other | {"data_split": name}


def _parts(data: DataConfig, names: list[str]) -> dict[str, dict[str, Any]]:
    """The options that each source of a mixture has for itself: name, revision, what it holds out and leaves out."""
    revisions, hold_outs = (
        value.split(JOINED) if value and value.count(JOINED) == len(names) - 1 else [value] * len(names)
        for value in (data.revision, data.hold_out)
    )
    skips = [part.strip() for part in data.skip_data.split(",") if part.strip()]
    if other := [skip for skip in skips if not skip.startswith(tuple(f"{name}/" for name in names))]:
        raise UserError(
            f"skip_data is {shown(other[0])}: of several sources, begin with the one that is meant, NAME/FILE"
        )
    parts = {}
    for name, revision, hold_out in zip(names, revisions, hold_outs, strict=True):
        own = ",".join(skip.removeprefix(f"{name}/") for skip in skips if skip.startswith(f"{name}/"))
        parts[name] = {
            "data": name, "data_revision": revision, "hold_out": hold_out, "skip_data": own, "eval_data": None,
            "data_config": data.subset if is_hub_name(name) else None,
        }  # fmt: skip
    if data.subset is not None and not any(map(is_hub_name, names)):
        raise UserError(
            f"data_config is {shown(data.subset)}: only datasets of the Hub have configurations; leave it out"
        )
    return parts


def _open_one(
    config: RunConfig, shard: int, num_shards: int, evaluation: Evaluation | None
) -> "FileSource | HubSource":
    """One source; nothing of it is held out if other text is evaluated."""
    data = config.data
    path = Path(data.source).expanduser()
    is_old = data.hold_out == "count"  # some options were ignored then
    if data.source != "stdlib" and not path.exists():
        if not is_hub_name(data.source):
            several = "; several sources need weights, A=0.7,B=0.3" if "," in data.source else ""
            raise UserError(
                f"data is {data.source!r}: there is no such file or folder, and it is no Hub name (OWNER/NAME){several}"
            )
        if data.skip_data and not is_old:
            raise UserError(
                f"skip_data is {shown(data.skip_data)}: it leaves out files, and {data.source!r} is on the Hub"
            )
        revision = None if is_fingerprint(data.revision) else data.revision
        where = (data.source, data.subset, data.split, data.text_field, shard, num_shards, revision)
        return HubSource(*where, Reading(data.hold_out, evaluation))
    if data.revision is not None and not is_fingerprint(data.revision) and not is_old:
        raise UserError(f"data_revision is {shown(data.revision)}: only a dataset of the Hub has commits; leave it out")
    if data.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        if not is_old:
            check_split("data is 'stdlib'", data.split, ())
            if data.subset is not None:
                raise UserError(f"data_config is {shown(data.subset)}: only datasets have one; leave it out")
        found = DataFiles(root, stdlib_files(root), {}, {}, {})
    else:
        skip = None if is_old else functools.partial(is_skipped, data.skip_data)
        found = find_data(path, data.text_field, data.split, skip, None if is_old else data.subset)
    hold_out = data.hold_out
    validation = next((split for split in VALIDATION if split in found.splits and split != data.split), None)
    if evaluation is None and not is_old and data.split != ALL and validation is not None:
        other = config.with_options(data_split=validation, hold_out="nothing", skip_data="")
        if hold_out in (None, "nothing"):
            opened = functools.partial(_open_one, other, shard, num_shards, None)
            evaluation = Evaluation(f"the split {validation!r}", opened)
    if hold_out is None and evaluation is not None:
        hold_out = "nothing"
    reading = Reading(hold_out, evaluation, data.skip_data, data.source, data.split)
    return FileSource(found.files, config.seed, data.text_field, shard, num_shards, found, reading)


def is_hub_name(name: str) -> bool:
    """Whether data of this name are looked for on the Hub: OWNER/NAME, and no file or folder."""
    path = Path(name).expanduser()
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and kind_of(path) is None and not path.exists()


def is_fingerprint(revision: str | None) -> bool:
    """Whether the data are files, whose fingerprint stands in place of a commit."""
    return (revision or "").startswith(FILES)


def check_new_data(config: RunConfig, source: Source) -> None:
    """Refuse what cannot be meant where a run begins; later, files that an option names may be gone.

    Raises:
        UserError: --skip-data names no file, or the text to evaluate is the text that is trained on.
    """
    patterns = [pattern.strip() for pattern in config.data.skip_data.split(",") if pattern.strip()]
    if unknown := [pattern for pattern in patterns if not source.has_file(pattern)]:
        raise UserError(f"skip_data is {shown(config.data.skip_data)}: no file of the data is {shown(unknown[0])}")
    trained = {file.resolve() for file in source.files}
    for evaluation in source.evaluations:
        if both := [file for file in evaluation.open().files if file.resolve() in trained]:
            raise UserError(f"eval_data: {str(both[0])!r} is trained on, too: leave it out of one of them")


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
        reading: Reading = AS_FOUND,
    ):
        """`reading`: no whole files are held out, and none are left out."""
        hold_out, evaluation = reading.hold_out, reading.evaluation
        self._shard, self._num_shards = shard, num_shards
        self._name, self._config, self._split, self._text_field = name, config, split, text_field
        self._retry = RetryPolicy(f"the dataset {name!r} on the Hub")
        if not hub_reachable():
            raise UserError(
                f"data: there is no file or folder {name!r}, and the Hugging Face Hub, for a dataset of that name, "
                "could not be reached: check the name and the network, or pass --data FILE and --tokenizer FOLDER"
            )
        commit = revision or self._with_retries(self._newest_revision)
        self.position = {"pass": 0, "row": 0, "stream": None, "revision": commit, "skipped": 0}
        self._opened = self._with_retries(self._open)  # now: a wrong name is reported before anything slow
        self._retry.succeeded()
        validation = next((other for other in VALIDATION if other in self._splits and other != split), None)
        if evaluation is None and validation is not None and hold_out in (None, "nothing"):
            where = (name, config, validation, text_field, shard, num_shards, commit)
            evaluation = Evaluation(
                f"the split {validation!r}", functools.partial(HubSource, *where, Reading(hold_out="nothing"))
            )
        self.evaluations = [evaluation] if evaluation is not None else []
        self.hold_out = hold_out or ("nothing" if evaluation is not None else "chunks")
        names = self._opened.column_names
        self.seen = Counts()
        self.notes: list[str] = []
        self.left_out: dict[str, str] = {}
        if names is not None and text_field.partition(".")[0] not in names and not form_in(names, text_field):
            raise UserError(f"data: {name!r}: {without_text(text_field, names)}")
        if others := other_side(text_field, names or ()):
            self.notes.append(one_sided(text_field, others))

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
        for row, stream_position in self._rows():
            number = self._at["row"]
            try:
                text = text_in(row, self._text_field, self.hold_out != "count")
            except OtherPart:
                text = None
                self.seen.other_parts += 1
            skipped = self._at["skipped"] + (text is None and self._at["pass"] == 0)  # a later pass skips the same
            self._at = self._at | {"row": number + 1, "stream": stream_position, "skipped": skipped}
            self.seen.skipped_rows += text is None
            if text is not None:
                self.seen.add(utf8_bytes(text), ends_document=True)
                yield TextChunk(text, True, held_out=self.hold_out != "nothing" and number % HOLD_OUT == 1)
        self._at = self._at | {"pass": self._at["pass"] + 1, "row": 0, "stream": None}

    def held_out(self) -> Iterator[TextChunk]:
        if self.evaluations:
            evaluated = self.evaluations[0].open()
            self.seen = evaluated.seen
            return evaluated.chunks()
        return (chunk for chunk in self.chunks() if chunk.held_out)

    @property
    def files(self) -> list[Path]:
        return []

    def has_file(self, pattern: str) -> bool:
        return False

    def reports(self) -> list[SourceReport]:
        said = "nothing is held out" if self.hold_out == "nothing" else f"held out: one row in {HOLD_OUT}"
        if self.evaluations:
            said = f"evaluated on {self.evaluations[0].name}; {said}"
        return [SourceReport(self._name, {}, self._split, dict.fromkeys(self._splits), said, None, self.seen)]

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
                        f"be opened on the Hub ({one_line(error)}), and there is no file or folder of that name: check "
                        "the names and the network, or pass --data FILE"
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

        configure_clients()
        bound_requests()
        revision = self._at["revision"]
        try:
            # Not its own cache: if the Hub fails, `datasets` would use whatever commit was downloaded there before.
            with tempfile.TemporaryDirectory() as empty:
                streams = datasets.load_dataset(
                    self._name, self._config, split=None, streaming=True, revision=revision, cache_dir=empty
                )
        except Exception as error:
            if not isinstance(error.__cause__ or error.__context__, RevisionNotFoundError):
                raise
            raise UserError(
                f"data: the dataset {self._name!r} no longer has the commit {revision} that the run was started on: "
                "pass --overwrite to start over with its present state"
            ) from None
        self._splits = [str(split) for split in streams]
        if self._split not in self._splits:
            raise UserError(
                f"data: {self._name!r} has no split {self._split!r}: pass --data-split, one of {listed(self._splits)}"
            )
        stream = streams[self._split]
        if self._num_shards == 1:
            return stream
        return split_dataset_by_node(stream, rank=self._shard, world_size=self._num_shards)


def hub_reachable() -> bool:
    """Whether the Hub answers at all.

    Checked once before its clients are used: without a network they retry for half a minute per file.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    bound_requests()
    try:
        get_session().head(constants.ENDPOINT)
    except Exception:  # the HTTP library's own kinds, or the client's where HF_HUB_OFFLINE is set
        return False
    return True
