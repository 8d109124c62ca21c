"""Errors that are part of the interface, and how commands report them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

EXIT_USER_ERROR = 2


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
