"""Train a configuration, or several, on a Slurm cluster.

    plt submit configs/runs/plt2_1b.yaml --cluster h100_modules --nodes 16 --time 24:00:00 --chain 5
    plt submit --branch-from runs/trunk@20000 name=shorter --cluster h100_modules --nodes 16 --time 24:00:00

Checks everything before it submits anything. Options override the cluster's profile. The run's folder then holds all
that its job needs, with the job script as a plain file: sbatch RUN/job.sbatch submits it again. See docs/slurm.md.

Exit status: 0 submitted (with --follow: finished), 1 --follow saw the run fail or stop, 2 something for you to fix.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plt_megatron.commands import CommandParser, command, whole
from plt_megatron.errors import UserError
from plt_megatron.installation import ROOT
from plt_megatron.run_folder.resuming import add_branch_options
from plt_megatron.slurm.client import LONGEST_MARGIN

if TYPE_CHECKING:
    from plt_megatron.config.schema import RunConfig
    from plt_megatron.slurm.resources import Resources
    from plt_megatron.slurm.submission import Options


def _arguments(parser: CommandParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="CONFIG.yaml key=value", help="a run, and settings to change")
    add_branch_options(parser)
    size = parser.add_argument_group("the job")
    size.add_argument("--cluster", metavar="NAME", help="profile: a name in configs/clusters, or a path")
    size.add_argument("--nodes", type=whole(1), default=1, metavar="N", help="default 1")
    size.add_argument("--time", metavar="LIMIT", help="time limit of one job, as in 24:00:00")
    size.add_argument("--gpus-per-node", metavar="[TYPE:]N", help="default: the profile's, else all of a node's")
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        size.add_argument(f"--{name}", metavar=name.upper(), help="as for sbatch")
    longer = parser.add_argument_group("runs longer than the time limit")
    longer.add_argument("--chain", type=whole(1, 1000), default=1, metavar="N", help="submit N jobs in sequence")
    longer.add_argument("--requeue", action="store_true", help="requeue the job until the run is finished")
    margin = whole(1, LONGEST_MARGIN)
    longer.add_argument("--signal-margin", type=margin, metavar="SECONDS", help="save this long before the limit")
    several = parser.add_argument_group("several runs")
    several.add_argument(
        "--array", metavar="FILE", help="a list of configuration files, one per line, or a folder of run folders"
    )
    several.add_argument("--max-concurrent", type=whole(1), metavar="N", help="array runs at a time")
    parser.add_argument("--name", help="name of the run or array, whose folder is OUTPUT_DIR/NAME")
    parser.add_argument("--accept-changes", action="store_true", help="resume a run with a changed configuration")
    parser.add_argument("--rehearse", action="store_true", help="rehearse the job here first, which takes a minute")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the job script, and stop")
    parser.add_argument(
        "--follow", action="store_true", help="show progress until the job ends; Ctrl-C leaves it running"
    )


@command("submit", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    from plt_megatron.slurm.status import follow
    from plt_megatron.slurm.submission import submit

    submission = submit(_options(arguments), ROOT, _rehearsed if arguments.rehearse else None)
    return follow(submission) if arguments.follow and submission is not None else 0


def _rehearsed(config: RunConfig, vocab_size: int, resources: Resources) -> list[str]:
    """Return a rehearsal's problems; print its other findings."""
    if resources.card == "cpu":
        return ["--rehearse is for jobs on GPUs: leave it out"]
    from plt_megatron.predict.rehearsal.rehearse import rehearse
    from plt_megatron.predict.rehearsal.report import to_text

    found = rehearse(
        config,
        vocab_size,
        world_size=resources.world_size,
        gpu=resources.card,
        gpus_per_node=resources.processes_per_node,
    )
    print(to_text(found), flush=True)
    return [f"rehearsal: {problem}" for problem in found.problems]


def read_options(argv: Sequence[str]) -> Options:
    """Parse the options for a caller that supplies the runs and settings."""
    parser = CommandParser("submit", description="")
    _arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.arguments or arguments.follow or arguments.rehearse or arguments.dry_run:
        raise UserError(
            "--submit takes options of plt submit, but no configurations, settings, --rehearse, --follow or --dry-run"
        )
    return _options(arguments)


def _options(arguments: argparse.Namespace) -> Options:
    from plt_megatron.slurm.submission import Options

    given = vars(arguments).copy()
    words, _, _ = given.pop("arguments"), given.pop("follow"), given.pop("rehearse")
    config = None if arguments.array or arguments.branch_from or not words else words[0]
    return Options(config=config, overrides=words if config is None else words[1:], **given)
