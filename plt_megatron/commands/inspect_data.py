"""Show what a run's batches contain, and find validation text in the training data.

    plt inspect-data configs/runs/plt2_tiny.yaml --batch 3
    plt inspect-data configs/runs/plt2_tiny.yaml --duplicates --html data.html

Shows each sample's text, its source documents, and which tokens count in the loss. Builds the run's sample index if it
is missing, as the run would. See docs/data.md.
"""

from __future__ import annotations

import argparse
import logging

from plt_megatron.commands import CommandParser, command, whole


def _arguments(parser: CommandParser) -> None:
    parser.add_config("data.sequence_length=512")
    parser.add_argument("--part", choices=("train", "validation"), default="train", help="default: train")
    parser.add_argument(
        "--batch", type=whole(1), default=1, metavar="N", help="the N-th global batch, from 1; default: 1"
    )
    parser.add_argument(
        "--samples", type=whole(1), default=4, metavar="N", help="samples of that batch to show; default: 4"
    )
    parser.add_argument(
        "--width",
        type=whole(0),
        default=2000,
        metavar="N",
        help="characters of a document to show; 0: all; default: 2000",
    )
    parser.add_argument("--html", metavar="FILE", help="also write everything as an HTML page")
    parser.add_argument(
        "--duplicates", action="store_true", help="search all training data for the run's validation documents"
    )
    parser.add_argument(
        "--span-tokens", type=whole(8), default=50, metavar="N", help="shortest shared span to report; default: 50"
    )


@command("inspect-data", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    from plt_megatron.config.loader import load_config
    from plt_megatron.config.validation import validate
    from plt_megatron.runtime.environment import quiet_imports

    config = load_config(arguments.config, arguments.overrides)
    validate(config, check_packages=False, have_te=False)  # nothing is trained
    quiet_imports(logging.WARNING)
    if arguments.html:
        from plt_megatron.experiments.data_page import check_page

        check_page(arguments.html)
    from plt_megatron.data.inspection import Inspector, describe_batch, describe_duplicates

    inspector = Inspector(config)
    batch = inspector.batch(arguments.part, arguments.batch, arguments.samples)
    found = None
    print(describe_batch(batch, arguments.width or None), flush=True)
    if arguments.duplicates:
        found = inspector.find_duplicates(arguments.span_tokens)
        print(f"\n{describe_duplicates(found, inspector)}")
    if arguments.html:
        from plt_megatron.experiments.data_page import write_page

        write_page(arguments.html, config, batch, found, inspector)
        print(f"\npage: {arguments.html}")
