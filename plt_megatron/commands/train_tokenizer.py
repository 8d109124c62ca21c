"""Train a sentencepiece tokenizer and write it for Hugging Face as well."""

from __future__ import annotations

import argparse

from plt_megatron.commands import CommandParser, command, given, whole
from plt_megatron.data.command_line import INPUT_HELP, add_reading_arguments, read_options


def _arguments(parser: CommandParser) -> None:
    parser.epilog = (
        "Writes tokenizer.model, tokenizer.json and tokenizer_config.json, after checking on the corpus and on "
        "hostile strings that all encode identically."
    )
    parser.add_argument(
        "--input", dest="inputs", nargs="+", action="extend", required=True, metavar="FILE", help=INPUT_HELP
    )
    parser.add_argument("--output", dest="output_dir", required=True, metavar="FOLDER", help="folder for the tokenizer")
    parser.add_argument("--vocab-size", type=whole(1, 10_000_000), required=True)
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument(
        "--special-token",
        dest="control_symbols",
        action="append",
        default=[],
        metavar="TOKEN",
        help="a token that text never produces; repeatable",
    )
    parser.add_argument(
        "--user-defined-symbol",
        dest="user_defined_symbols",
        action="append",
        default=[],
        metavar="TOKEN",
        help="a token that is always kept whole in text; repeatable",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of characters in the vocabulary; the rest fall back to bytes (default: 0.9995)",
    )
    parser.add_argument(
        "--keep-digits-together", dest="split_digits", action="store_false", help="allow pieces of several digits"
    )
    parser.add_argument(
        "--max-sample-mb", type=whole(1, 1 << 20), default=200, help="train on at most this much text (default: 200 MB)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed for sampling the text")
    parser.add_argument(
        "--threads", type=whole(1, 1024), help="default: all cores; for unigram, whose pieces depend on it, 16"
    )
    add_reading_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")


@command("train-tokenizer", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    coverage = arguments.character_coverage
    if not 0.98 <= coverage <= 1:  # sentencepiece's own limits
        raise argparse.ArgumentError(None, f"--character-coverage must be from 0.98 to 1, got {coverage:g}")
    from plt_megatron.data.tokenizer_training import TrainingOptions, train_tokenizer

    read, sample = read_options(arguments), arguments.max_sample_mb << 20
    options = TrainingOptions(**given(arguments, TrainingOptions), max_sample_bytes=sample, read=read)
    result = train_tokenizer(options)
    print(result.summary)
