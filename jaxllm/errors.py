"""The errors that a user can mend or has asked for, and how a command line shows them."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line that names the field, the value and the mend.

    No ValueError: tyro catches those of a config's checks, and would draw a box of many lines around the message.
    """


class Stopped(Exception):
    """Training has stopped where a signal asked it to; the message says where and how to go on."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


STORAGE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
)
"""What a disk says that is full, read-only, forbidden, broken or gone."""


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main`: what a user can mend becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Stopped as stop:
            print(stop, file=sys.stderr)
            return stop.code
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            print(
                f"error: {error.filename or 'a file'}: {error.strerror}: make room there or permit it", file=sys.stderr
            )
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130  # the shells' code for Ctrl-C

    return wrapped
