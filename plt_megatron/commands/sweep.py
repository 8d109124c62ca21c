"""Train variants of one model: loop counts, ablation rows, sizes, seeds.

    plt sweep configs/sweeps/smoke.yaml --dry-run
    plt sweep configs/sweeps/paper_ablation.yaml --jobs 2
    plt sweep configs/sweeps/loops.yaml seeds=[1,2] model.num_layers=8 --slurm --cluster mine

Prints the plan first. Skips finished runs and resumes the others where they stopped, so the same command continues
a sweep. docs/sweeps.md describes the file.
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from plt_megatron.commands import CommandParser, command, submit, whole


def _arguments(parser: CommandParser) -> None:
    parser.epilog = (
        "Exit status: 0 done, 1 a run failed, 2 something for you to fix, 75 stopped (the running runs saved their "
        "state)."
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="a sweep, as in configs/sweeps")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="a setting of the sweep (seeds=[1,2], match_budget=tokens, axes.model.loop_count=[1,2]) or of every run",
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for where to run, and whether to run at all."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="run on this machine (the default)")
    where.add_argument("--slurm", action="store_true", help="submit a job array; needs --cluster")
    parser.add_argument("--cluster", metavar="NAME", help="with --slurm: a profile in configs/clusters, or a path")
    parser.add_argument("--max-concurrent", type=whole(1), metavar="N", help="with --slurm: array members at once")
    parser.add_argument(
        "--submit", metavar="OPTIONS", default="", help="with --slurm: options for plt submit, as in '--time 24:00:00'"
    )
    parser.add_argument(
        "--gpu",
        metavar="CARD",
        help="card to estimate times for (default: the cluster's, else h100; without Slurm, cpu)",
    )
    parser.add_argument(
        "--jobs", type=whole(1), default=1, metavar="N", help="single-process runs at once on this machine"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise `ArgumentError` if options contradict each other."""
    if arguments.slurm != (arguments.cluster is not None):
        raise argparse.ArgumentError(None, "--slurm and --cluster NAME go together")
    if (arguments.max_concurrent is not None or arguments.submit) and not arguments.slurm:
        raise argparse.ArgumentError(None, "--max-concurrent and --submit are for --slurm; on this machine use --jobs")


@command("sweep", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    check_options(arguments)
    from plt_megatron.experiments.sweep import RunOptions, run_sweep

    return run_sweep(arguments.config, arguments.settings, RunOptions(**run_options(arguments)))


def run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `RunOptions`."""
    options = {name: getattr(arguments, name) for name in ("dry_run", "jobs", "gpu")}
    if arguments.slurm:
        try:
            given = ["--cluster", arguments.cluster, *shlex.split(arguments.submit)]
        except ValueError as error:  # an open quotation
            raise argparse.ArgumentError(None, f"--submit: {error}: {arguments.submit}") from error
        if arguments.max_concurrent is not None:
            given += ["--max-concurrent", str(arguments.max_concurrent)]
        options["submit"] = submit.read_options(given)
    return options
