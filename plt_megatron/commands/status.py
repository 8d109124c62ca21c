"""Show runs: job states, steps, speed, time left, restarts with their reasons, and the last checkpoint.

    plt status                # all runs in runs/
    plt status runs/plt2_1b   # one, or all below a folder

Reads Slurm and the runs' folders; without Slurm, only the folders.
"""

from __future__ import annotations

import argparse

from plt_megatron.commands import CommandParser, command


def _arguments(parser: CommandParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, or folders of runs; default: all")
    parser.add_argument("--output-dir", default="runs", metavar="DIR", help="folder of all runs; default: runs")
    parser.add_argument("--json", action="store_true", help="one JSON object per run")


@command("status", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    from plt_megatron.slurm.status import report

    print(report(arguments.runs, arguments.output_dir, arguments.json))
