"""Reading a file that somebody else may have made: only a real file, and never more of it than makes sense."""

from __future__ import annotations

import stat
from pathlib import Path

from jaxllm.errors import UserError


def check_file(path: Path, most: int | None = None) -> None:
    """Whether it is a file, perhaps behind a symlink, of at most so many bytes. A pipe would be waited for forever.

    Raises:
        UserError: it is none, or is larger.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is a folder, a pipe or a device, and a file is expected")
    if most is not None and status.st_size > most:
        raise _too_large(path, status.st_size, most)


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a file that has at most so many.

    Raises:
        UserError: it cannot be read, or is larger.
    """
    check_file(path, most)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > most:  # it grew, or its size is not known beforehand, as in /proc
        raise _too_large(path, len(content), most)
    return content


def _too_large(path: Path, size: int, most: int) -> UserError:
    return UserError(f"{path} has {size} bytes or more: a file of its kind has at most {most}; make it again")
