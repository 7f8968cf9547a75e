"""What is replaced in the whole process, here and nowhere else (`run/signals.py` handles signals).

`forgiving_console`: a command that loses its console continues without it. Not only `print` writes there: progress
bars and libraries do too.
`silence_reported_errors`: an error of writing a checkpoint is raised and becomes one line. orbax, asyncio and
tensorstore print it as well, from threads and finalizers that only the process's own hooks reach.
"""

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Console:
    """A standard stream. After a failed write, its file descriptor leads to nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any, *args: Any) -> None:
        try:
            action(*args)
        except ValueError:  # the stream is closed
            pass
        except OSError:  # the pipe or the terminal is closed, or the disk is full
            with contextlib.suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def forgiving_console() -> Iterator[None]:
    """Within it, writing to stdout and stderr never fails. What cannot be encoded is shown as escapes."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process: without this, the next opened file would get its descriptor
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream if isinstance(stream, _Console) else _Console(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


@functools.cache
def silence_reported_errors() -> None:
    """Keep libraries from printing what a failed save raises anyway, now and when the process ends."""
    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    hook_before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # tensorstore finds more errors in the files of a save that has failed already
        if str(unraisable.exc_value) != "Event loop is closed":
            hook_before(unraisable)

    sys.unraisablehook = hook
