"""Check that activations, updates and logits keep their size as width, depth or loop count grows.

    plt check-coordinates configs/runs/plt2_demo.yaml optimizer.name=adam [--axes depth loops] --output coordinates.png

Trains tiny variants of the configuration for a few steps on random tokens, in seconds. Exit status 1: sizes change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plt_megatron.commands import CommandParser, command, whole

AXES = ("width", "depth", "loops")


def _arguments(parser: CommandParser) -> None:
    parser.add_config()
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, help="what to vary (default: all)")
    parser.add_argument("--steps", type=whole(1), default=5, help="optimizer steps (default 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a plot to this .png, .svg or .pdf file")


@command("check-coordinates", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    import logging

    from plt_megatron.config.loader import load_config
    from plt_megatron.runtime.environment import quiet_imports

    quiet_imports(logging.WARNING)
    from plt_megatron.experiments.coordinates import SIZES, check_coordinates, plot, table, verdict

    config = load_config(arguments.config, arguments.overrides)
    results = check_coordinates(config, {axis: SIZES[axis] for axis in arguments.axes}, arguments.steps)
    print(table(results))
    print()
    for result in results:
        print(verdict(result))
    if arguments.output is not None:
        plot(results, arguments.output)
        print(arguments.output)
    return 0 if all(result.is_flat for result in results) else 1
