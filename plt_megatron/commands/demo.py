"""Train a small PLT and its one-loop baseline on text this machine already has. Safe to run again."""

from __future__ import annotations

from collections.abc import Sequence

from plt_megatron.commands import CommandParser
from plt_megatron.errors import run_command


def main(argv: Sequence[str]) -> int:
    CommandParser("demo", description=__doc__, epilog="All output goes to .demo in the current folder.").parse_args(
        argv
    )
    return run_command(_demo, "interrupted: run it again to continue")


def _demo() -> None:
    from plt_megatron.demo.run import run_demo

    run_demo()
