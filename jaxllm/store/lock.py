"""The lock of a run's folder: one process trains there. The lock ends with its process, however that ends."""

import contextlib
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import Self

import filelock

from jaxllm.errors import UserError
from jaxllm.files import StrPath

LOCK_FILE = ".jaxllm-lock"
"""Its name in a run's folder, which no other program uses."""

OWNER_FILE = f"{LOCK_FILE}-owner"
"""The process, host and time of its owner."""


class FolderLock:
    """The lock of a run's folder, a context manager that releases it. `take` acquires it and creates the folder."""

    def __init__(self, folder: StrPath):
        folder = Path(folder)
        self._folder, self._file, self._owner_file = folder, folder / LOCK_FILE, folder / OWNER_FILE
        self._lock: filelock.BaseFileLock | None = None

    def take(self) -> None:
        """Acquire the lock. Raises UserError if another process holds it, or if nothing can be written there."""
        where = f"run_dir is {str(self._folder)!r}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._file, timeout=0, thread_local=False)
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{where}: {self._owner()} trains there; wait, or pass another --run-dir") from None
        except FileExistsError:
            raise UserError(f"{where}: that is a file; pass another --run-dir") from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{where}: nothing can be written there ({reason})") from None
        self._lock = lock
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            self._owner_file.write_text(f"process {os.getpid()} on {platform.node()}, since {since}", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        if self._lock is None:
            return
        for file in (self._owner_file, self._file):
            with contextlib.suppress(OSError):
                file.unlink()
        self._lock.release()
        with contextlib.suppress(OSError):  # it is empty if no run was made in it
            self._folder.rmdir()

    def _owner(self) -> str:
        try:
            owner = self._owner_file.read_text(encoding="utf-8")[:200].strip().replace("\n", " ")
        except (OSError, ValueError):
            owner = ""
        return owner or "another process"
