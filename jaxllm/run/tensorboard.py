"""TensorBoard events of a run, written by tensorboardX in a background thread."""

import errno
import functools
import math
import os
import sys
import threading
import weakref
from pathlib import Path
from typing import Any


class TensorBoardWriter:
    """Writes the numbers of each record.

    tensorboardX's thread dies on a full disk, and adding more events then blocks forever. Here it raises the error.
    """

    def __init__(self, folder: Path, first_step: int):
        """`first_step`: events of later steps, from a process that was killed, are hidden."""
        _record_thread_errors()
        self._folder, self._closed = folder, False
        before = set(threading.enumerate())
        # The queue has room for the events of many records, so that none blocks before `_check` finds the thread dead.
        self._writer = _summary_writer()(str(folder), purge_step=first_step + 1, max_queue=1000)
        self._threads = [thread for thread in threading.enumerate() if thread not in before and _is_writer(thread)]

    def write(self, record: dict[str, Any]) -> None:
        """Write a record. Raises OSError if the disk refused what was written before."""
        self._check()
        for name, value in record.items():
            if name not in ("step", "epoch") and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(_tag(name), value, record["step"])

    def close(self) -> None:
        """Close the file. Raises OSError as `write` does."""
        if not self._closed:
            self._closed = True
            self._check()
            self._writer.close()

    def _check(self) -> None:
        for thread in self._threads:
            if not thread.is_alive():
                code = getattr(_thread_errors.get(thread), "errno", None) or errno.EIO
                raise OSError(code, os.strerror(code), str(self._folder))


_thread_errors: weakref.WeakKeyDictionary[threading.Thread, BaseException | None] = weakref.WeakKeyDictionary()
"""The error that ended each writer thread."""


@functools.cache
def _record_thread_errors() -> None:
    """Record the error of a writer thread instead of printing it, now and again when the process ends."""
    hook_before, unraisable_before = threading.excepthook, sys.unraisablehook

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.thread is not None and _is_writer(args.thread):
            _thread_errors[args.thread] = args.exc_value
        else:
            hook_before(args)

    def unraisable_hook(unraisable) -> None:
        if not str(getattr(unraisable.object, "__module__", "")).startswith("tensorboardX"):
            unraisable_before(unraisable)

    threading.excepthook, sys.unraisablehook = hook, unraisable_hook


def _is_writer(thread: threading.Thread) -> bool:
    return type(thread).__module__.startswith("tensorboardX")


def _summary_writer() -> type:
    """tensorboardX's writer. It would also import PyTorch where that is installed: two seconds for nothing."""
    modules: dict[str, Any] = sys.modules
    hide = "torch" not in modules
    if hide:
        modules["torch"] = None  # importing it fails, as if it were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del modules["torch"]
    return SummaryWriter


def _tag(name: str) -> str:
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("eval", "train") else f"train/{name}"
