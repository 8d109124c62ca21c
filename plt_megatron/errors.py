"""Errors that are part of the interface, and how commands report them."""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Callable
from typing import Any, TextIO

EXIT_USER_ERROR = 2
EXIT_BROKEN_PIPE = 128 + 13


class UserError(ValueError):
    """Something the user can fix. Each problem is one line: what is wrong, where, and what to do."""


def import_optional(module: str, purpose: str, extra: str) -> Any:
    """A module of one of the package's extras, or a `UserError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{purpose} needs the package {package}: pip install 'plt-megatron[{extra}]'") from error


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; each line of a `UserError` becomes an `error:` line on stderr, exit status 2.

    A command whose reader has left, as `head` does, ends as one that SIGPIPE has killed.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print_error(error)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        if not _lost_its_reader(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return EXIT_BROKEN_PIPE


def _lost_its_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, select.POLLERR)
    return bool(poll.poll(0))


def print_error(error: Exception | str) -> None:
    """The error on stderr, without a traceback."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
