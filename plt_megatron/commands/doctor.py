"""Show what this machine can run, and what is missing for the rest."""

from __future__ import annotations

import argparse

from plt_megatron.commands import CommandParser, command


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "Exit status: 0 if this machine can train, else 1."
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


@command("doctor", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    from plt_megatron.runtime import doctor, machine

    report = doctor.judge(machine.observe())
    if arguments.json:
        print(report.to_json())
    else:
        doctor.render(report)
    return 0 if report.can_train else 1
