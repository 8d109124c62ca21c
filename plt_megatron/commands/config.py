"""Rename old settings in configuration files of earlier versions."""

from __future__ import annotations

import argparse
from pathlib import Path

from plt_megatron.commands import CommandParser, command


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "Run folders and checkpoints do not need this: those of any version are read as they are."
    parser.add_argument("action", choices=["upgrade"], help="upgrade: rewrite the files, keeping comments")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a run's configuration, or part of one")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file has old names")


@command("config", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    from plt_megatron.config.upgrade_file import upgrade_text
    from plt_megatron.config.yaml_nodes import read_text
    from plt_megatron.run_folder.files import write_text

    old = 0
    for path in arguments.files:
        text = read_text(path)
        upgraded = upgrade_text(text, str(path))
        if upgraded == text:
            print(f"{path}: nothing to change")
            continue
        old += 1
        if not arguments.check:
            write_text(path.resolve(), upgraded)  # a link stays one
        print(f"{path}: {'has old names' if arguments.check else 'rewritten'}")
    return 1 if old and arguments.check else 0
