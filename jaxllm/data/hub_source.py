"""A dataset of the Hugging Face Hub as a source: streamed, of one commit, opened again after a transient error."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxllm.config.groups import DataConfig
from jaxllm.data.chats import OtherPart, form_in, one_sided, other_side, text_in, without_text
from jaxllm.data.hub_retry import RetryPolicy, bound_requests, configure_clients, hub_reachable, transient_cause
from jaxllm.data.report import Counts, SourceReport
from jaxllm.data.source import HOLD_OUT, WHOLE, Evaluation, Shard, TextChunk, check_position, utf8_bytes
from jaxllm.data.splits import VALIDATION
from jaxllm.errors import UserError, listed, one_line


class HubSource:
    """A streamed dataset of the Hugging Face Hub; rows come in the dataset's own order.

    One of several shards has its own files of the dataset if they divide evenly, or else every n-th row. It keeps one
    commit: that of `data.revision`, or the newest one when it is opened.
    """

    def __init__(self, data: DataConfig, shard: Shard = WHOLE, evaluation: Evaluation | None = None):
        self._data, self._shard = data, shard
        name, split, text_field = data.source, data.split, data.text_field
        self._retry = RetryPolicy(f"the dataset {name!r} on the Hub")
        if not hub_reachable():
            raise UserError(
                f"data: there is no file or folder {name!r}, and the Hugging Face Hub, for a dataset of that name, "
                "could not be reached: check the name and the network, or pass --data FILE and --tokenizer FOLDER"
            )
        commit = data.revision or self._with_retries(self._newest_revision)
        self.position = {"pass": 0, "row": 0, "stream": None, "revision": commit, "skipped": 0}
        self._opened = self._with_retries(self._open)  # now: a wrong name is reported before anything slow
        self._retry.succeeded()
        validation = next((other for other in VALIDATION if other in self._splits and other != split), None)
        if evaluation is None and validation is not None and data.hold_out in (None, "nothing"):
            other = dataclasses.replace(data, split=validation, revision=commit, hold_out="nothing")
            evaluation = Evaluation(f"the split {validation!r}", functools.partial(HubSource, other, shard))
        self.evaluations = [evaluation] if evaluation is not None else []
        self.hold_out = data.hold_out or ("nothing" if evaluation is not None else "chunks")
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
                text = text_in(row, self._data.text_field, self.hold_out != "count")
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
            return self.evaluations[0].read_for(self)
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
        splits = dict.fromkeys(self._splits)
        return [SourceReport(self._data.source, {}, self._data.split, splits, said, None, self.seen)]

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
        """Call `ask` until it succeeds, as long as its errors are transient; a permanent one becomes a UserError."""
        while True:
            try:
                made = ask()
            except UserError:
                raise
            except Exception as error:
                if transient_cause(error) is None:
                    raise UserError(
                        f"data: the dataset {self._data.source!r} (config {self._data.subset!r}, split "
                        f"{self._data.split!r}) could not be opened on the Hub ({one_line(error)}), and there is no "
                        "file or folder of that name: check the names and the network, or pass --data FILE"
                    ) from None
                self._retry.wait(error)
            else:
                return made

    def _newest_revision(self) -> str:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(self._data.source).sha)

    def _open(self):
        import datasets
        from datasets.distributed import split_dataset_by_node
        from huggingface_hub.errors import RevisionNotFoundError

        configure_clients()
        bound_requests()
        name, split, revision = self._data.source, self._data.split, self._at["revision"]
        try:
            # Not its own cache: if the Hub fails, `datasets` would use whatever commit was downloaded there before.
            with tempfile.TemporaryDirectory() as empty:
                streams = datasets.load_dataset(
                    name, self._data.subset, split=None, streaming=True, revision=revision, cache_dir=empty
                )
        except Exception as error:
            if not isinstance(error.__cause__ or error.__context__, RevisionNotFoundError):
                raise
            raise UserError(
                f"data: the dataset {name!r} no longer has the commit {revision} that the run was started on: "
                "pass --overwrite to start over with its present state"
            ) from None
        self._splits = [str(split) for split in streams]
        if split not in self._splits:
            raise UserError(f"data: {name!r} has no split {split!r}: pass --data-split, one of {listed(self._splits)}")
        stream = streams[split]
        if self._shard.of == 1:
            return stream
        return split_dataset_by_node(stream, rank=self._shard.number, world_size=self._shard.of)
