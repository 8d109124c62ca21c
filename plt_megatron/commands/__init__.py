"""The commands: one module each, with its arguments and a `main` that returns the exit status.

pyproject.toml installs them as `plt-NAME`; the scripts of launch/ and tools/ start them from a checkout, and
`python -m plt_megatron.commands.NAME` works as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import plt_megatron
from plt_megatron.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, hear_every_interrupt, prepare_streams, print_error


class CommandParser(argparse.ArgumentParser):
    """Reads a command's arguments; has `--version`."""

    def __init__(self, **options: Any) -> None:
        if "\n" in options["description"]:
            options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"plt-megatron {plt_megatron.__version__}")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """See argparse. An argument that is not UTF-8 is an error."""
        prepare_streams()
        for word in sys.argv[1:] if args is None else args:
            try:
                word.encode()
            except UnicodeEncodeError:
                self.error(f"the argument {word!a} is not UTF-8 text")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One line, like every other error, in the place of all options, and status 2."""
        print_error(f"{' '.join(message.split())}; see {self.prog} --help")
        sys.exit(EXIT_USER_ERROR)


def _end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a command's modules are being imported; everything later is `errors.run_command`'s."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)


sys.excepthook = _end_quietly
hear_every_interrupt()
