"""Run lm-evaluation-harness tasks on an exported model, with tasks from local files.

    plt-evaluate --model exported --tasks reading,arithmetic --include-path tasks

The scores are printed, and kept in the export's evaluation.json and on its card. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from plt_megatron.commands import CommandParser


def _parser() -> CommandParser:
    parser = CommandParser(
        description=__doc__,
        epilog="Exit status: 0 evaluated, 2 something for you to fix.",
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a folder written by plt-export")
    parser.add_argument("--tasks", required=True, type=_names, metavar="NAMES", help="separated by commas")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder of task files")
    parser.add_argument("--limit", type=int, metavar="N", help="rows of each task (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _evaluate(arguments: argparse.Namespace) -> None:
    from plt_megatron.hf import arguments as checks

    checks.check_export(arguments.model)
    checks.check_file("--include-path", arguments.include_path)
    checks.check_device(arguments.device)
    from plt_megatron.hf.evaluation import evaluate
    from plt_megatron.run_folder.text import format_table

    scores = evaluate(
        arguments.model, arguments.tasks, arguments.include_path, limit=arguments.limit, device=arguments.device
    )
    print(format_table([[name, f"{value:.4f}"] for name, value in scores.items()]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.tasks:
        parser.error("--tasks names none")
    if arguments.limit is not None and arguments.limit < 1:
        parser.error("--limit must be above 0")
    from plt_megatron.hf.command_line import run_conversion

    return run_conversion(lambda: _evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main())
