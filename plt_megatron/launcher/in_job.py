"""Entry point inside a Slurm job, run as a file by job.sbatch in the run's folder, which plt submit writes.

    in_job.py check RUN                on the first node: does another job train the run?
    srun ... in_job.py node RUN        one launcher per node: checks it, starts the run's processes and monitors them
    in_job.py finalize RUN --status N  after they have exited: finish, requeue, exclude a bad node, or give up

Exit status: 0 finished, 1 failed, 2 something for you to fix, 75 preempted, 76 a node failed the checks,
77 a node was lost, 78 another job trains the run.
"""

from __future__ import annotations

import sys

# Python puts this file's folder first; replace it with the root of the run's snapshot, two folders up.
sys.path[0] = __file__.rsplit("/", 3)[0]

import argparse  # noqa: E402
from pathlib import Path  # noqa: E402

from plt_megatron.errors import AttemptFailed, describe_os_error, print_error, run_command  # noqa: E402
from plt_megatron.launcher.finalize import finalize_job, patiently  # noqa: E402
from plt_megatron.launcher.node import check_no_other_job, launch_node  # noqa: E402
from plt_megatron.run_folder.attempts import ExitStatus  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs inside a Slurm job; called by its batch script.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="whether another job trains the run; outside any container")
    node = commands.add_parser("node", help="the launcher of one node; srun starts it once per node")
    finalize = commands.add_parser("finalize", help="decide what follows after the launchers have exited")
    for command in (check, node, finalize):
        command.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    finalize.add_argument("--status", metavar="N", type=int, required=True, help="srun's exit status")
    arguments = parser.parse_args()
    if arguments.command == "check":
        return patiently(lambda: check_no_other_job(arguments.run))
    if arguments.command == "node":
        try:
            return launch_node(arguments.run)
        except (OSError, AttemptFailed) as error:  # not for the user to fix: the next attempt may fare better
            print_error(describe_os_error(error) if isinstance(error, OSError) else error)
            return ExitStatus.FAILED
    return finalize_job(arguments.run, arguments.status)


if __name__ == "__main__":
    sys.exit(run_command(main))
