"""Train a small PLT and its one-loop baseline on text this machine already has. Safe to run again."""

from __future__ import annotations

from plt_megatron.commands import CommandParser, command


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "All output goes to .demo in the current folder."


@command("demo", __doc__, _arguments, interrupted="interrupted: run it again to continue")
def main(_: object) -> None:
    from plt_megatron.demo.run import run_demo

    run_demo()
