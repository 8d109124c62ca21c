"""Show what this machine can run, and what is missing for the rest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from plt_megatron.commands import CommandParser
from plt_megatron.errors import run_command


def main(argv: Sequence[str]) -> int:
    parser = CommandParser("doctor", description=__doc__, epilog="Exit status: 0 if this machine can train, else 1.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _doctor(arguments))


def _doctor(arguments: argparse.Namespace) -> int:
    from plt_megatron.runtime import doctor, machine

    report = doctor.judge(machine.observe())
    if arguments.json:
        print(report.to_json())
    else:
        doctor.render(report)
    return 0 if report.can_train else 1
