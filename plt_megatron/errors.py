"""Errors that are part of the interface, and how commands report them."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something the user can put right. Each problem is one line: what, where, and what to do."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; each line of a `UserError` becomes an `error:` line on stderr, exit status 2."""
    try:
        return main() or 0
    except UserError as error:
        print_error(error)
        return EXIT_USER_ERROR


def print_error(error: Exception | str) -> None:
    """The error on stderr, without a traceback."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
