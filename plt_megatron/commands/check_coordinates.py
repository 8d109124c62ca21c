"""Check that activations, updates and logits keep their size when a model gets wider, deeper or loops more.

    plt check-coordinates configs/runs/plt2_demo.yaml [key=value ...] [--axes depth loops] --output coordinates.png

Trains tiny variants of the configuration for a few steps on random tokens, in seconds. Exit status 1: not flat.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from plt_megatron.commands import CommandParser
from plt_megatron.errors import run_command

AXES = ("width", "depth", "loops")


def main(argv: Sequence[str]) -> int:
    parser = CommandParser("check-coordinates", description=__doc__)
    parser.add_argument("config", help="a run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, help="what to vary (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a plot to this .png, .svg or .pdf file")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    return run_command(lambda: _check(arguments))


def _check(arguments: argparse.Namespace) -> int:
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
