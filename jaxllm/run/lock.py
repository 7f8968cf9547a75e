"""One run folder, one process that trains in it: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import datetime
from pathlib import Path

import filelock

from jaxllm.errors import UserError

LOCK_FILE = ".jaxllm-lock"
"""Its name in a run's folder: one that nobody else's file has."""

OWNER_FILE = f"{LOCK_FILE}-owner"
"""Who holds it, in words."""


class FolderLock:
    """The lock of a run's folder; used with `with`, which gives it back. `take` takes it, and makes the folder."""

    def __init__(self, folder: Path):
        self._folder, self._file, self._owned_by = folder, folder / LOCK_FILE, folder / OWNER_FILE
        self._lock: filelock.BaseFileLock | None = None

    def take(self) -> None:
        """
        Raises:
            UserError: another process holds it, or nothing can be written there.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._file, timeout=0, thread_local=False)
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"run_dir is {str(self._folder)!r}: {self._owner()} trains there; wait for its end, or pass another "
                "--run-dir"
            ) from None
        except FileExistsError:
            raise UserError(f"run_dir is {str(self._folder)!r}: that is a file") from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"run_dir is {str(self._folder)!r}: nothing can be written there ({reason})") from None
        self._lock = lock
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            self._owned_by.write_text(f"process {os.getpid()} on {platform.node()}, since {since}", encoding="utf-8")

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exc) -> None:
        if self._lock is None:
            return
        for file in (self._owned_by, self._file):
            with contextlib.suppress(OSError):
                file.unlink()
        self._lock.release()
        with contextlib.suppress(OSError):  # it holds a run; where nothing came of it, nothing is left
            self._folder.rmdir()

    def _owner(self) -> str:
        try:
            return self._owned_by.read_text(encoding="utf-8")[:200].strip().replace("\n", " ") or "another process"
        except (OSError, ValueError):
            return "another process"
