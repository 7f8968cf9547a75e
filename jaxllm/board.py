"""TensorBoard events of a run, by tensorboardX, whose writer is a thread of its own."""

from __future__ import annotations

import errno
import math
import sys
import threading
from pathlib import Path
from typing import Any


class Board:
    """Writes the numbers of each record.

    The thread of tensorboardX dies on a full disk, and whoever goes on adding events then waits for ever. Here they get
    the error.
    """

    def __init__(self, folder: Path, first_step: int):
        """`first_step`: events of later steps, by a process that was killed, are hidden."""
        self._folder, self._error, self._closed = folder, None, False
        before = set(threading.enumerate())
        # The queue has room for the events of many records, so that none waits before `_check` finds the thread dead.
        self._writer = _summary_writer()(str(folder), purge_step=first_step + 1, max_queue=1000)
        started = (thread for thread in threading.enumerate() if thread not in before)
        self._threads = [thread for thread in started if type(thread).__module__.startswith("tensorboardX")]
        self._hook_before, threading.excepthook = threading.excepthook, self._failed

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
        threading.excepthook = self._hook_before
        self._check()
        self._writer.close()

    def _check(self) -> None:
        if self._error is not None or not all(thread.is_alive() for thread in self._threads):
            reason = self._error or OSError(errno.EIO, "the writer has ended")
            raise OSError(
                getattr(reason, "errno", errno.EIO), getattr(reason, "strerror", str(reason)), str(self._folder)
            )

    def _failed(self, args: threading.ExceptHookArgs) -> None:
        if args.thread in self._threads:
            self._error = args.exc_value
        else:
            self._hook_before(args)


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
