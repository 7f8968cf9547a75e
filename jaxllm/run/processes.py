"""Several processes, one run: how they start together, agree, and exchange JSON values.

Whatever one process does alone while others wait ends at a barrier of the coordination service, whose time limit is
long; the collectives of the devices have a short one. What one process finds wrong is raised by all, or ends all.
"""

import base64
import contextlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from jaxllm.config.groups import MeshConfig
from jaxllm.data.stream import Position
from jaxllm.errors import UserError, as_user_error, one_line
from jaxllm.run.huge_pages import restart_with_huge_pages
from jaxllm.run.runtime import start_jax

T = TypeVar("T")

BARRIER_SECONDS = 24 * 3600
"""How long processes wait for one that reads data or compiles. If one dies, the coordinator ends the others."""

_counter = itertools.count()


def init_distributed(mesh: MeshConfig, options: dict[str, Any]) -> None:
    """Connect to the run's other processes, if it has any, before anything asks for a device.

    Before that, the process may restart itself with huge pages. `options`: all that the command line gave.

    Raises:
        UserError: they cannot connect, or were given different options; or JAX finds no device.
    """
    restart_with_huge_pages()
    if mesh.coordinator is None:
        start_jax()
        return
    automatic = mesh.coordinator == "auto"
    rest = "" if automatic else f", process {mesh.process_id} of {mesh.num_processes}"
    what = f"coordinator is {mesh.coordinator!r}{rest}: the processes could not connect"
    with as_user_error(lambda error: f"{what} ({one_line(error)}): start all of them, and check the address"):
        if automatic:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(mesh.coordinator, mesh.num_processes, mesh.process_id)
    start_jax()
    given = _from_each(options | {"process_id": None})
    for process, other in enumerate(given):
        for name, value in other.items():
            if value != given[0][name]:
                raise UserError(
                    f"{name} is {value!r} in process {process} and {given[0][name]!r} in process 0: "
                    "all processes must be given the same"
                )


def num_processes() -> int:
    return jax.process_count()


def is_primary() -> bool:
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes have reached this line, however long one takes."""
    if jax.process_count() > 1:
        wait = multihost.get_barrier_sync_fn()
        wait(key=f"jaxllm {name} {next(_counter)}", timeout_ms=BARRIER_SECONDS * 1000)


@contextlib.contextmanager
def silence_non_primary() -> Iterator[None]:
    """Discard what the other processes print; their errors are still shown."""
    if is_primary():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8", errors="ignore") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def abort_if_multiprocess(error: BaseException) -> None:
    """Print the error and end this process at once, if it is one of several: it would otherwise wait for the others.

    The coordinator notices and ends them.
    """
    if jax.process_count() == 1:
        return
    if isinstance(error, UserError):
        print(f"error: process {jax.process_index()}: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def all_check(check: Callable[[], Any]) -> None:
    """Run a check in every process. A UserError that any process raises is raised in all of them."""
    if jax.process_count() == 1:
        check()
        return
    found = None
    try:
        check()
    except UserError as error:
        found = str(error)
    for process, message in enumerate(_from_each(found)):
        if message is not None:
            raise UserError(f"process {process}: {message}")


def each_result(work: Callable[[], T]) -> T:
    """What `work` returns in this process. A UserError that any process raises is raised in all of them."""
    made: list[T] = []
    all_check(lambda: made.append(work()))
    return made.pop()


def primary_result(work: Callable[[], Any]) -> Any:
    """What `work` returns in the primary process, in all processes: JSON values.

    If it fails, the primary process raises the error, and the others exit without a message.
    """
    answer: dict[str, Any] = {}
    failed: BaseException | None = None
    if is_primary():
        try:
            answer = {"made": work()}
        except BaseException as error:
            failed, answer = error, {"failed": True}
    barrier("primary result")
    message = json.dumps(answer).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    received = multihost_utils.broadcast_one_to_all(np.resize(np.frombuffer(message, np.uint8), length))
    answer = json.loads(bytes(received))
    if failed is not None:
        raise failed
    if "failed" in answer:
        sys.exit(2)
    return answer["made"]


def all_positions(local: dict[int, Position]) -> list[bytes]:
    """The encoded positions of all data streams, from every process's own. All processes must call it."""
    encoded = {str(s): base64.b64encode(position.to_bytes()).decode() for s, position in local.items()}
    found = all_gather(encoded)
    return [base64.b64decode(found[s]) for s in sorted(found, key=int)]


def all_have(local: str | None) -> str | None:
    """What the primary process has, if every process has something. All must call it."""
    found = _from_each(local)
    return None if None in found else found[0]


def all_sum(local: int) -> int:
    """The sum over all processes. All must call it."""
    return sum(_from_each(local))


def all_min(local: float) -> float:
    """The minimum over all processes. All must call it."""
    return min(_from_each(local))


def all_gather(local: dict[str, Any]) -> dict[str, Any]:
    """The entries of all processes' dicts of JSON values, in one dict. All must call it."""
    return {name: value for each in _from_each(local) for name, value in each.items()}


def _from_each(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    barrier("exchange")
    message = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(message)))
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
