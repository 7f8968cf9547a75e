"""Errors that a user can fix, how a command line shows them, and how a value appears in a one-line message."""

import contextlib
import errno
import functools
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxllm.console import forgiving_console


class UserError(Exception):
    """Bad input. The message is one line that names the field, the value and the remedy.

    Not a ValueError: tyro catches those from a config's checks and draws a box of many lines around the message.
    """


class Stopped(Exception):
    """Training stopped because a signal asked for it. The message says where, and how to resume."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


STORAGE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
)
"""Errors of a disk that is full, read-only, forbidden, broken or gone."""


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main`: an error that the user can fix becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    @forgiving_console()
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
                f"error: {error.filename or 'a file'}: {error.strerror}: free space or permit access", file=sys.stderr
            )
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130  # the shells' code for Ctrl-C

    return wrapped


@contextlib.contextmanager
def as_user_error(message: Callable[[Exception], str]) -> Iterator[None]:
    """Within it an error of any kind becomes a UserError with this message: libraries raise kinds of their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(message(error)) from None


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Within it an error becomes a line on stderr: for what a run does without, such as its picture."""
    try:
        yield
    except Exception as error:
        print(f"warning: {what} failed ({type(error).__name__}: {one_line(error)})", file=sys.stderr)


@functools.cache
def note(line: str) -> None:
    """Say once what is read otherwise than one may expect: on stderr, since stdout may be a generated text."""
    print(line, file=sys.stderr)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlevel = 3

MAX_NAMES = 20


def shown(value: Any) -> str:
    """`repr` for a message: one short line, whatever the value holds and however deeply it is nested."""
    return _repr.repr(value)


def listed(names: Iterable[str], most: int = MAX_NAMES) -> str:
    """The first names, and how many more there are. A name that is long or would break the line is quoted."""
    names = list(names)
    first = [name if name.isprintable() and len(name) <= 120 else shown(name) for name in names[:most]]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def one_line(error: BaseException) -> str:
    """The first line of an error, shortened, for a one-line message."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
