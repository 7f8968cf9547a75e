"""What a hostile file may not do, watched while it is read: run something, reach another folder, hang, fill memory."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.errors import UserError

MAX_MEMORY = 300 * 2**20
MAX_SECONDS = 20
MAX_CHARACTERS = 8_000
"""Of a message: it quotes the first of what is wrong, never the whole of a file."""

STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn"}
CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree"}

_ROOT = Path(__file__).parents[1]
# What Python and its libraries open by themselves: modules that are imported late, and what the system says of itself.
_LIBRARIES = [sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), str(_ROOT), "/proc", "/sys"]


def _own_caches() -> list[str]:
    """Of compiled programs; `conftest.py` names them."""
    return [str(folder) for folder in (jax.config.jax_compilation_cache_dir, os.environ["JAXLLM_CACHE_DIR"]) if folder]


_allowed: Path | None = None
_trespasses: list[str] = []


def _path_of(event: str, arguments: tuple) -> str:
    """What an event is about: `shutil.rmtree` names a file relative to a folder that is open."""
    path, folder = os.fsdecode(arguments[0]), arguments[1] if event in ("os.remove", "os.rmdir") else -1
    return os.path.realpath(path if folder == -1 else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path))


def _watch(event: str, arguments: tuple) -> None:
    if _allowed is None:
        return
    if event in STARTS:
        _trespasses.append(f"{event} {arguments}")
    elif (event == "open" and isinstance(arguments[0], (str, bytes))) or event in CHANGES:
        path = _path_of(event, arguments)
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        roots = [str(_allowed), "/dev/null", *_own_caches()] + ([] if writes else _LIBRARIES)
        if not any(path == root or path.startswith(f"{root}{os.sep}") for root in roots):
            _trespasses.append(f"{event} {path}")


sys.addaudithook(_watch)  # stays for the life of the process, and looks away where nothing is watched


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Nothing is started, and no file outside `folder` is opened or changed, as far as Python knows."""
    global _allowed
    _trespasses.clear()
    _allowed = folder.resolve()
    try:
        yield
    finally:
        _allowed = None
    assert not _trespasses, _trespasses


class Hang(BaseException):
    """No `Exception`: what turns those into a UserError must not swallow it."""


@contextmanager
def in_time(seconds: float = MAX_SECONDS) -> Iterator[None]:
    def late(*_) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def in_memory(most: int = MAX_MEMORY) -> Iterator[None]:
    """The process at no time holds so much more than at the start. Linux alone tells and forgets such a peak."""
    if not Path("/proc/self/clear_refs").exists():
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    yield
    assert _peak() - before < most, f"{(_peak() - before) / 2**20:.0f} MiB more than at the start"


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def outcome(folder: Path, call: Callable[[], Any]) -> Any:
    """What a call on files in `folder` returns, or the UserError that it raises; anything else fails the test."""
    with in_time(), watched(folder):
        try:
            return call()
        except UserError as error:
            result = error
    assert len(str(result).splitlines()) == 1, repr(str(result))
    assert len(str(result)) < MAX_CHARACTERS, str(result)
    return result


def refused(folder: Path, call: Callable[[], Any], part: str = "") -> None:
    result = outcome(folder, call)
    assert isinstance(result, UserError), result
    assert part in str(result), result


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same bytes."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
