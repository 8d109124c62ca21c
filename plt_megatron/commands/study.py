"""Find out which loop count to train: a study over sizes, loops and tokens, in rounds of the most informative runs.

    plt study configs/studies/smoke.yaml --dry-run
    plt study configs/studies/loop_law.yaml --jobs 2 --budget 40h
    plt study configs/studies/cluster.yaml --slurm --cluster mine

Prints each round, with what it should tell, before running it. Skips finished runs and resumes others where they
stopped, so the same command continues a study. docs/sweeps.md describes the file.
"""

from __future__ import annotations

import argparse

from plt_megatron.commands import CommandParser, command, sweep


def _arguments(parser: CommandParser) -> None:
    parser.epilog = (
        "Exit status: 0 decided, the budget spent, or submitted; 1 a run failed, 2 something for you to fix, 75 "
        "stopped (the running runs saved their state)."
    )
    parser.add_argument("config", metavar="STUDY.yaml", help="a study, as in configs/studies")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="a setting of the study (rounds=2, seeds=[1,2]) or of every run",
    )
    parser.add_argument("--budget", metavar="TIME", help="training time of all runs together: 40h, 90min, 2d")
    parser.add_argument("--report", action="store_true", help="report on the existing runs, and run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    sweep.add_options(parser)


@command("study", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    sweep.check_options(arguments)
    if arguments.report and (arguments.dry_run or arguments.retry_failed):
        raise argparse.ArgumentError(None, "--report runs nothing: leave out --dry-run and --retry-failed")
    from plt_megatron.extras import require

    require("plt study", "jinja2", "scipy")
    from plt_megatron.experiments.study.rounds import StudyOptions, run_study

    own = {"retry_failed": arguments.retry_failed, "report_only": arguments.report}
    options = StudyOptions(**sweep.run_options(arguments), **own)
    budget = [f"budget={arguments.budget}"] if arguments.budget else []
    return run_study(arguments.config, [*arguments.settings, *budget], options)
