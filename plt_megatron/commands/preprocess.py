"""Tokenize a corpus into megatron-core's indexed format, or build the sample index of a run ahead of time."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plt_megatron.commands import CommandParser, given, whole
from plt_megatron.data.command_line import INPUT_HELP, add_reading_arguments, read_options
from plt_megatron.errors import UserError, run_command
from plt_megatron.run_folder.text import plural
from plt_megatron.runtime.local_processes import usable_cores

if TYPE_CHECKING:
    from plt_megatron.data.preprocess import PreprocessOptions

_MOST_SHARDS = 99_999  # five digits in a file's name


def _parser() -> CommandParser:
    parser = CommandParser(
        "preprocess",
        description=__doc__,
        epilog="Writes <output-prefix>.bin, .idx and a manifest. Run again after an interruption, the same command "
        "continues where it stopped.",
    )
    parser.add_argument("overrides", nargs="*", help="with --build-index: key=value settings of the configuration")
    data = parser.add_argument_group("input and output")
    data.add_argument("--input", dest="inputs", nargs="+", action="extend", metavar="FILE", help=INPUT_HELP)
    data.add_argument("--output-prefix", metavar="PREFIX", help="path of the .bin and .idx, without the suffix")
    data.add_argument("--tokenizer", metavar="FILE", help="a sentencepiece .model or a Hugging Face tokenizer.json")
    data.add_argument(
        "--join",
        nargs="+",
        action="extend",
        metavar="PREFIX",
        help="instead of --input: combine tokenized sources into one, leaving them in place; globs match in name order",
    )
    data.add_argument("--overwrite", action="store_true", help="replace an existing output that has other contents")
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
    reading.add_argument(
        "--no-append-eod", dest="append_eod", action="store_false", help="do not end documents with that token"
    )
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=whole(1), help="processes (default: all cores)")
    work.add_argument(
        "--shard",
        metavar="I/N",
        help="tokenize the Ith of N portions of the input, one per machine, to <output-prefix>.shard-I-of-N; --join "
        "combines them",
    )
    work.add_argument("--shard-mb", type=float, default=64, help="input per unit of work, in MiB (default: 64)")
    jobs = parser.add_argument_group("on a cluster")
    jobs.add_argument(
        "--cluster", metavar="NAME", help="submit to Slurm with this profile: a name in configs/clusters, or a path"
    )
    jobs.add_argument(
        "--nodes", type=whole(1, _MOST_SHARDS), default=1, metavar="N", help="input shards, one per node (default: 1)"
    )
    jobs.add_argument("--time", metavar="LIMIT", help="time limit per job, as in 24:00:00 (default: the profile's)")
    index = parser.add_argument_group("sample index")
    index.add_argument(
        "--build-index",
        metavar="CONFIG",
        help="instead of tokenizing, build the sample index for this configuration; with --cluster: build it in a job "
        "after tokenizing",
    )
    return parser


def _options(arguments: argparse.Namespace) -> PreprocessOptions:
    from plt_megatron.data.preprocess import PreprocessOptions

    options = given(arguments, PreprocessOptions) | {
        "workers": arguments.workers or usable_cores(),
        "fail_on_bad_line": arguments.on_bad_line == "fail",
        "shard": _shard(arguments.shard),
        "shard_bytes": max(1, int(arguments.shard_mb * (1 << 20))),
    }
    return PreprocessOptions(**options, read=read_options(arguments))


def _tokenize(arguments: argparse.Namespace) -> None:
    from plt_megatron.data.preprocess import preprocess

    preprocess(_options(arguments))


def _submit(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Submit this command as an array of its shards, a job that joins them, and one for the sample index if asked."""
    from plt_megatron.data.joining import check_output
    from plt_megatron.data.preprocess import check_options, shard_prefix
    from plt_megatron.slurm.preprocessing import submit_preprocessing

    check_options(_options(arguments))
    prefix, nodes, tokenizer = arguments.output_prefix, arguments.nodes, arguments.tokenizer
    parts = [shard_prefix(prefix, number, nodes) for number in range(1, nodes + 1)]
    check_output(prefix, overwrite=arguments.overwrite, parts=parts)
    following = {"join": ["--join", *parts, "--output-prefix", prefix, "--overwrite"]}
    if arguments.build_index:
        _check_reads(arguments, prefix)
        following["index"] = ["--build-index", arguments.build_index, *arguments.overrides]
    options = _without(argv, "--cluster", "--nodes", "--time", "--workers", "--build-index")
    ids, folder = submit_preprocessing(
        [option for option in options if option not in arguments.overrides],
        following,
        prefix,
        reads=[*((f"--input {path}", path) for path in arguments.inputs), (f"--tokenizer {tokenizer}", tokenizer)],
        cluster=arguments.cluster,
        nodes=nodes,
        time=arguments.time,
        workers=arguments.workers,
    )
    works = (plural(nodes, "shard"), "which joins them", "which builds the sample index")
    jobs = "; ".join(f"job {number}, {work}" for number, work in zip(ids, works, strict=False))
    print(f"submitted {jobs}: {folder}")


def _without(argv: Sequence[str], *options: str) -> list[str]:
    """Return the arguments without the given options, which may be abbreviated, and their values."""
    left, kept = iter(argv), []
    for argument in left:
        name, equals, _ = argument.partition("=")
        if len(name) <= 2 or not any(option.startswith(name) for option in options):
            kept.append(argument)
        elif not equals:
            next(left)
    return kept


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) <= _MOST_SHARDS):
        raise UserError(f"--shard {text}: expected I/N, with I from 1 to N, and N at most {_MOST_SHARDS}")
    return int(number), int(of)


def _join(arguments: argparse.Namespace) -> None:
    from plt_megatron.data.joining import join

    made = join(arguments.join, arguments.output_prefix, overwrite=arguments.overwrite)
    amount = f"{plural(made['documents'], 'document')}, {made['tokens']:,} tokens ({made['dtype']})"
    print(f"{arguments.output_prefix}: {plural(len(made['parts']), 'part')}, {amount}", file=sys.stderr)


def _check_reads(arguments: argparse.Namespace, prefix: str) -> None:
    """Raise `UserError` if no run of the configuration reads the source `prefix`. Sources need not exist yet."""
    from plt_megatron.config.loader import load_config
    from plt_megatron.config.schedules import all_sources
    from plt_megatron.config.validation import validate

    config = load_config(arguments.build_index, arguments.overrides)
    validate(config, check_files=False)
    if os.path.abspath(prefix) not in (os.path.abspath(source.path) for _, source in all_sources(config.data)):
        raise UserError(f"--build-index {arguments.build_index}: none of its data sources is {prefix}")


def _build_index(arguments: argparse.Namespace) -> None:
    """Print the run's data mix and build its sample index in this one process, so that the ranks find it ready."""
    from plt_megatron.config.loader import load_config
    from plt_megatron.config.validation import validate
    from plt_megatron.data.mix import describe_mix, drawn_samples, mix_shares, validation_alone
    from plt_megatron.data.tokenizer import load_tokenizer
    from plt_megatron.runtime.environment import quiet_imports

    quiet_imports()
    config = load_config(arguments.build_index, arguments.overrides)
    validate(config, check_packages=False, have_te=False)  # nothing is trained
    samples = drawn_samples(config)
    print(describe_mix(config.data, mix_shares(config.data, samples)), flush=True)
    from plt_megatron.data.datasets import build_datasets

    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    build_datasets(config, samples, tokenizer)
    for _, alone in validation_alone(config) if config.validation.by_source and samples[1] else ():
        build_datasets(alone, (0, samples[1], 0), tokenizer)
    print(f"the sample index of {samples[0]:,} train and {samples[1]:,} validation samples is ready")


def _refuse_unused(parser: CommandParser, arguments: argparse.Namespace) -> None:
    """End the command if it would ignore an argument."""
    names = set(vars(arguments))
    if arguments.join:
        work, used = "--join", {"join", "output_prefix", "overwrite"}
    elif arguments.cluster:
        work, used = "--cluster", names - {"shard"} - (set() if arguments.build_index else {"overrides"})
    elif arguments.build_index:
        work, used = "--build-index without --cluster", {"build_index", "overrides"}
    else:
        work, used = "tokenizing without --cluster", names - {"nodes", "time", "overrides"}
    for action in parser._actions:
        if action.dest in names - used and getattr(arguments, action.dest) not in (action.default, []):
            parser.error(f"{work} does not use {'/'.join(action.option_strings) or arguments.overrides[0]}")


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    _refuse_unused(parser, arguments)
    if arguments.build_index and not arguments.cluster:
        return run_command(lambda: _build_index(arguments))
    if arguments.join:
        if not arguments.output_prefix:
            parser.error("missing --output-prefix")
        return run_command(lambda: _join(arguments))
    needed = {
        "--input": arguments.inputs,
        "--output-prefix": arguments.output_prefix,
        "--tokenizer": arguments.tokenizer,
    }
    if missing := [name for name, value in needed.items() if not value]:
        parser.error(f"missing {', '.join(missing)}")
    if not 0 < arguments.shard_mb < math.inf:
        parser.error("--shard-mb must be a number above 0")
    if not os.path.basename(arguments.output_prefix):
        parser.error(f"--output-prefix {arguments.output_prefix} is a folder: name a file in it, without a suffix")
    if arguments.cluster:
        return run_command(lambda: _submit(arguments, argv))
    return run_command(lambda: _tokenize(arguments), "interrupted: the same command continues where this one stopped")
