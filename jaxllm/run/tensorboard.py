"""TensorBoard events of a run, by tensorboardX, whose writer is a thread of its own."""

from __future__ import annotations

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

    The thread of tensorboardX dies on a full disk, and whoever goes on adding events then waits for ever. Here they get
    the error.
    """

    def __init__(self, folder: Path, first_step: int):
        """`first_step`: events of later steps, by a process that was killed, are hidden."""
        _note_deaths()
        self._folder, self._closed = folder, False
        before = set(threading.enumerate())
        # The queue has room for the events of many records, so that none waits before `_check` finds the thread dead.
        self._writer = _summary_writer()(str(folder), purge_step=first_step + 1, max_queue=1000)
        self._threads = [thread for thread in threading.enumerate() if thread not in before and _is_writer(thread)]

    def write(self, record: dict[str, Any]) -> None:
        """
        Raises:
            OSError: the disk does not take what was written before.
        """
        self._check()
        for name, value in record.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(_board_name(name), value, record["step"])

    def close(self) -> None:
        """
        Raises:
            OSError: as `write`.
        """
        if self._closed:
            return
        self._closed = True
        self._check()
        self._writer.close()

    def _check(self) -> None:
        for thread in self._threads:
            if not thread.is_alive():
                reason = _deaths.get(thread)
                code = getattr(reason, "errno", None) or errno.EIO
                raise OSError(code, os.strerror(code), str(self._folder))


_deaths: weakref.WeakKeyDictionary[threading.Thread, BaseException] = weakref.WeakKeyDictionary()
"""The writers' threads that have died, and of what."""


@functools.cache
def _note_deaths() -> None:
    """From now on the death of a writer is noted instead of printed, and not told once more at the process's end."""
    hook_before, unraisable_before = threading.excepthook, sys.unraisablehook

    def hook(args: threading.ExceptHookArgs) -> None:
        if _is_writer(args.thread):
            _deaths[args.thread] = args.exc_value
        else:
            hook_before(args)

    def unraisable_hook(unraisable) -> None:
        if not str(getattr(unraisable.object, "__module__", "")).startswith("tensorboardX"):
            unraisable_before(unraisable)

    threading.excepthook, sys.unraisablehook = hook, unraisable_hook


def _is_writer(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboardX")


def _summary_writer() -> type:
    """tensorboardX's writer. Where PyTorch is installed it would import that too: two seconds, and no use here."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # an import of it fails, as where it is not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


def _board_name(name: str) -> str:
    for prefix in ("eval_", "train_"):
        if name.startswith(prefix):
            return f"{prefix[:-1]}/{name.removeprefix(prefix)}"
    return f"train/{name}"
