"""TensorBoard events of a run, written by tensorboardX in a background thread."""

import functools
import math
import sys
import threading
import weakref
from typing import Any

from jaxllm.errors import optional
from jaxllm.files import StrPath


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record by their names in a tracker: `train/`, `eval/`, or `end/` for the last line.

    The last line holds means of the whole run: among the training lines they would look like a spike.
    """
    closing, found = "train_runtime" in record, {}
    for name, value in record.items():
        if name not in ("step", "epoch") and isinstance(value, int | float) and math.isfinite(value):
            group, _, rest = name.partition("_")
            rest = rest if group in ("eval", "train") else name
            found[f"{'end' if closing else 'eval' if group == 'eval' else 'train'}/{rest}"] = value
    return found


class TensorBoardWriter:
    """Writes the numbers of each record, as long as the disk takes them.

    tensorboardX's thread dies on a full disk, and adding more events then blocks forever.
    """

    def __init__(self, folder: StrPath, first_step: int):
        """`first_step`: events of later steps, from a process that was killed, are hidden."""
        _record_thread_errors()
        self._writer, self._threads = None, []
        before = set(threading.enumerate())
        with optional(f"writing {folder}"):
            # The queue has room for the events of many records, so that none blocks before the thread is found dead.
            self._writer = _summary_writer()(str(folder), purge_step=first_step + 1, max_queue=1000)
        self._threads = [thread for thread in threading.enumerate() if thread not in before and _is_writer(thread)]

    def write(self, record: dict[str, Any]) -> None:
        """Write a record, unless an earlier one could not be written."""
        for thread in self._threads:
            if not thread.is_alive() and self._writer is not None:
                print(
                    f"warning: TensorBoard's events are no longer written ({_thread_errors.get(thread)})",
                    file=sys.stderr,
                )
                self._writer = None
        if self._writer is None:
            return
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._writer is not None and all(thread.is_alive() for thread in self._threads):
            self._writer.close()
        self._writer = None


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
