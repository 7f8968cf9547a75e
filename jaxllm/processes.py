"""Several processes, one run: they find each other, and the first one prepares and speaks for all.

Whatever one process does alone and others wait for ends at a barrier of the coordination service, which has patience; a
collective of the devices has not. What one process finds wrong, all say or end with.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from jaxllm.checkpoint import choose_checkpoint, delete_unfinished, set_aside
from jaxllm.config import TrainConfig
from jaxllm.data.corpus import one_line, open_source
from jaxllm.data.stream import Position
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError
from jaxllm.lock import FolderLock
from jaxllm.run import Prepared, prepare

PATIENCE = 24 * 3600
"""Seconds that processes wait for one that reads data or compiles; for one that has died the coordinator ends them."""

_numbers = itertools.count()


def join(config: TrainConfig) -> None:
    """Meet the run's other processes, before anything asks for a device; nothing where the run has one process.

    Raises:
        UserError: they do not come together, or were not told the same.
    """
    if config.coordinator is None:
        return
    found = config.coordinator == "auto"
    try:
        if found:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    except Exception as error:  # of the network, of the cluster's environment: kinds of their own
        rest = "" if found else f", process {config.process_id} of {config.num_processes}"
        raise UserError(
            f"coordinator is {config.coordinator!r}{rest}: the processes did not come together ({one_line(error)})"
        ) from None
    told = _from_each(config.to_dict() | {"process_id": None})
    for process, other in enumerate(told):
        for field, value in other.items():
            if value != told[0][field]:
                raise UserError(
                    f"{field} is {value!r} in process {process} and {told[0][field]!r} in process 0: "
                    "all processes must be given the same"
                )


def is_first() -> bool:
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Wait until all processes have come here, however long one takes."""
    if jax.process_count() > 1:
        barrier = multihost.get_barrier_sync_fn()
        barrier(key=f"jaxllm {where} {next(_numbers)}", timeout_ms=PATIENCE * 1000)


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Silence what the other processes print; their errors stay."""
    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def end_if_shared(error: BaseException) -> None:
    """Say the error and end this process at once, if it is one of several: going on would wait for the others.

    The coordinator sees it and ends them.
    """
    if jax.process_count() == 1:
        return
    if isinstance(error, UserError):
        print(f"error: process {jax.process_index()}: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def prepare_together(config: TrainConfig, lock: FolderLock) -> tuple[Prepared, int | None]:
    """`run.prepare` for all processes: the first one does it, the others read what it has written.

    Returns:
        What was prepared, and the step of the checkpoint to go on from; None: from the start.

    Raises:
        UserError: as `prepare` and `choose_checkpoint`; or a process does not see the data or the run's folder, before
            anything is deleted.
    """
    processes = jax.process_count()

    def prepare_and_choose() -> tuple[Prepared, int | None]:
        made = prepare(config, "JAX", lock, processes)
        if not made.resumes:
            return made, None
        chosen = choose_checkpoint(config.folder, strict=config.strict, before=config.replay)
        if config.replay is None:
            set_aside(config.folder, chosen.damaged)
            delete_unfinished(config.folder)
        return made, chosen.step

    if processes == 1:
        return prepare_and_choose()
    _all_agree(lambda: open_source(config))
    folder = config.folder.absolute().parent
    token = Path(_by_first(lambda: _make_token(folder)))

    def check_folder() -> None:
        if not token.is_file():
            raise UserError(f"run_dir is {str(config.folder)!r}: it must lie on a disk that all processes share")

    try:
        _all_agree(check_folder)
    finally:
        if is_first():
            token.unlink()

    def work() -> dict[str, Any]:
        made, step = prepare_and_choose()
        held_out = made.held_out.tolist()
        return {"config": made.config.to_dict(), "held_out": held_out, "resumes": made.resumes, "step": step}

    made = _by_first(work)
    config = TrainConfig.from_dict(made["config"])
    tokenizer = load_tokenizer(str(config.folder / "tokenizer"))
    prepared = Prepared(config, tokenizer, np.asarray(made["held_out"], np.int32), made["resumes"])
    return prepared, made["step"]


def _make_token(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".jaxllm-", dir=folder)
    except OSError as error:
        raise UserError(f"run_dir: nothing can be written to {folder}: {error.strerror}") from None
    os.close(handle)
    return name


def _all_agree(check: Callable[[], Any]) -> None:
    """Run a check in every process; what any finds wrong, all raise."""
    found = None
    try:
        check()
    except UserError as error:
        found = str(error)
    for process, said in enumerate(_from_each(found)):
        if said is not None:
            raise UserError(f"process {process}: {said}")


def _by_first(work: Callable[[], Any]) -> Any:
    """What the first process makes of `work`, in all processes: JSON values.

    If it fails, it raises what went wrong, and the others end without a word.
    """
    answer: dict[str, Any] = {}
    failed: BaseException | None = None
    if is_first():
        try:
            answer = {"made": work()}
        except BaseException as error:
            failed, answer = error, {"failed": True}
    meet("done by the first")
    message = json.dumps(answer).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    answer = json.loads(
        bytes(multihost_utils.broadcast_one_to_all(np.resize(np.frombuffer(message, np.uint8), length)))
    )
    if failed is not None:
        raise failed
    if "failed" in answer:
        sys.exit(2)
    return answer["made"]


def all_positions(own: dict[int, Position]) -> list[Position]:
    """The positions of all data streams, from every process's own; all processes must ask."""
    if jax.process_count() == 1:
        return [own[s] for s in sorted(own)]
    found: dict[int, Position] = {}
    for positions in _from_each({s: _to_json(position) for s, position in own.items()}):
        found |= {int(s): _from_json(position) for s, position in positions.items()}
    return [found[s] for s in sorted(found)]


def total(own: int) -> int:
    """The sum of all processes' counts; all processes must ask."""
    return own if jax.process_count() == 1 else sum(_from_each(own))


def least(own: float) -> float:
    """The least of all processes' numbers; all processes must ask."""
    return own if jax.process_count() == 1 else min(_from_each(own))


def gathered(own: dict[str, Any]) -> dict[str, Any]:
    """The entries of all processes' dicts of JSON values, in one; all processes must ask."""
    if jax.process_count() == 1:
        return own
    return {name: value for each in _from_each(own) for name, value in each.items()}


def _to_json(position: Position) -> dict[str, Any]:
    arrays = {name: base64.b64encode(getattr(position, name).tobytes()).decode() for name in ("tokens", "pool")}
    return {"source": position.source, "drawn": position.drawn, "width": position.pool.shape[1], **arrays}


def _from_json(values: dict[str, Any]) -> Position:
    tokens, pool = (np.frombuffer(base64.b64decode(values[name]), np.int32) for name in ("tokens", "pool"))
    return Position(values["source"], values["drawn"], tokens, pool.reshape(-1, values["width"]))


def _from_each(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    meet("a question to each")
    message = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(message)))
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
