"""Plot what runs recorded: losses, gradients, speed, memory, gates and hidden states per loop, step time by part.

    plt plot runs/plt2_demo [runs/other ...] --output metrics.png

One page, one color per run. Without --output the plot is metrics.png in the first run's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plt_megatron.commands import CommandParser, command


def _arguments(parser: CommandParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .png, .svg or .pdf file")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names of the runs; default: their folders' names")


@command("plot", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    if arguments.labels is not None and len(arguments.labels) != len(arguments.runs):
        raise argparse.ArgumentError(None, f"{len(arguments.labels)} labels for {len(arguments.runs)} runs")
    from plt_megatron.experiments.plots import plot_metrics

    output = arguments.output or arguments.runs[0] / "metrics.png"
    plot_metrics(arguments.runs, output, arguments.labels)
    print(output)
