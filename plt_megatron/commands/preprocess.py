"""Tokenize a corpus into megatron-core's indexed format, or build the sample index of a run ahead of time."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence

from plt_megatron.commands import CommandParser
from plt_megatron.data.command_line import INPUT_HELP, add_reading_arguments, read_options
from plt_megatron.errors import run_command


def _parser() -> CommandParser:
    parser = CommandParser(
        "preprocess",
        description=__doc__,
        epilog="Writes <output-prefix>.bin, .idx and a manifest. Run again after an interruption, the same command "
        "continues where it stopped.",
    )
    parser.add_argument("overrides", nargs="*", help="with --build-index: key=value settings of the configuration")
    data = parser.add_argument_group("input and output")
    data.add_argument("--input", nargs="+", metavar="FILE", help=INPUT_HELP)
    data.add_argument("--output-prefix", metavar="PREFIX", help="path of the .bin and .idx without the suffix")
    data.add_argument("--tokenizer", metavar="FILE", help="a sentencepiece .model or a Hugging Face tokenizer.json")
    data.add_argument("--overwrite", action="store_true", help="replace an output with other contents")
    reading = parser.add_argument_group("documents")
    add_reading_arguments(reading)
    reading.add_argument(
        "--on-bad-line",
        choices=("skip", "fail"),
        default="skip",
        help="broken JSON, missing field, not UTF-8, empty, too long: skip and report (default), or stop",
    )
    reading.add_argument(
        "--chat",
        action="store_true",
        help="documents are conversations, lists of messages: apply the chat template beside tokenizer.json, and write "
        "a loss mask of the assistant's answers",
    )
    reading.add_argument("--eod-token", help="the token that ends a document (default: the tokenizer's)")
    reading.add_argument("--no-append-eod", action="store_true", help="do not end documents with that token")
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    work.add_argument("--shard-mb", type=float, default=64, help="input per unit of work, in MiB (default: 64)")
    index = parser.add_argument_group("sample index")
    index.add_argument(
        "--build-index",
        metavar="CONFIG",
        help="build the sample index that a run of this configuration needs, instead of tokenizing",
    )
    return parser


def _tokenize(arguments: argparse.Namespace) -> None:
    from plt_megatron.data.preprocess import PreprocessOptions, preprocess

    preprocess(
        PreprocessOptions(
            inputs=arguments.input,
            output_prefix=arguments.output_prefix,
            tokenizer=arguments.tokenizer,
            workers=arguments.workers,
            format=arguments.format,
            eod_token=arguments.eod_token,
            append_eod=not arguments.no_append_eod,
            fail_on_bad_line=arguments.on_bad_line == "fail",
            overwrite=arguments.overwrite,
            shard_bytes=max(1, int(arguments.shard_mb * (1 << 20))),
            read=read_options(arguments),
        )
    )


def _build_index(arguments: argparse.Namespace) -> None:
    from plt_megatron.data.build_index import build_index
    from plt_megatron.runtime.environment import quiet_imports

    quiet_imports()
    build_index(arguments.build_index, arguments.overrides)


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.build_index:
        return run_command(lambda: _build_index(arguments))
    needed = {
        "--input": arguments.input,
        "--output-prefix": arguments.output_prefix,
        "--tokenizer": arguments.tokenizer,
    }
    if missing := [name for name, value in needed.items() if not value]:
        parser.error(f"missing {', '.join(missing)}")
    if arguments.overrides:
        parser.error(f"unexpected argument {arguments.overrides[0]!r}")
    for name in ("workers", "shard_mb", "max_document_bytes"):
        if not 0 < getattr(arguments, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a number above 0")
    if not os.path.basename(arguments.output_prefix):
        parser.error(f"--output-prefix {arguments.output_prefix} is a folder: name a file in it, without a suffix")
    return run_command(lambda: _tokenize(arguments), "interrupted: the same command continues where this one stopped")
