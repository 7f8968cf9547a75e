"""The console of a command. A command that loses it continues without it."""

import contextlib
import io
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
