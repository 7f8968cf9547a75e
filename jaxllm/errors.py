"""The one kind of error that a user can mend, and how a command line shows it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line that names the field, the value and the mend.

    No ValueError: tyro catches those of a config's checks, and would draw a box of many lines around the message.
    """


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main`: a `UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130  # the shells' code for Ctrl-C

    return wrapped
