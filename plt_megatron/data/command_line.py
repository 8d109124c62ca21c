"""Options shared by the commands that read raw text."""

from __future__ import annotations

import argparse
import math

from plt_megatron.data.formats import READERS, Quality, ReadOptions, describe_formats
from plt_megatron.errors import UserError

INPUT_HELP = f"files or globs: {describe_formats()}"


def add_reading_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that control how documents are read from files."""
    parser.add_argument("--format", choices=sorted(READERS), help="default: from the file suffixes")
    parser.add_argument(
        "--json-key", metavar="FIELD", help="field or column with the text (default: text; conversations: messages)"
    )
    parser.add_argument(
        "--text-documents",
        choices=("file", "line"),
        default="file",
        help="plain text: whether each file or each line is a document",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=ReadOptions.max_document_bytes,
        help="treat longer lines as bad (default: 16 MiB)",
    )
    parser.add_argument(
        "--quality-key", metavar="FIELD", help="numeric field or column that --min-quality and --max-quality apply to"
    )
    parser.add_argument("--min-quality", type=float, metavar="X", help="leave out documents below X")
    parser.add_argument("--max-quality", type=float, metavar="X", help="leave out documents at or above X")


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    """Return the options of `add_reading_arguments`. Raises `UserError` if they contradict each other."""
    chat = getattr(arguments, "chat", False)
    if arguments.max_document_bytes < 1:
        raise UserError(f"--max-document-bytes must be above 0, got {arguments.max_document_bytes:,}")
    return ReadOptions(
        arguments.json_key or ("messages" if chat else "text"),
        arguments.text_documents,
        arguments.max_document_bytes,
        _quality(arguments),
        chat or None,
    )


def _quality(arguments: argparse.Namespace) -> Quality | None:
    low, high = arguments.min_quality, arguments.max_quality
    if arguments.quality_key is None:
        if low is not None or high is not None:
            raise UserError("--min-quality and --max-quality need --quality-key, the numeric field to filter by")
        return None
    if low is None and high is None:
        raise UserError("--quality-key needs --min-quality, --max-quality or both")
    if not (-math.inf if low is None else low) < (math.inf if high is None else high):
        raise UserError(f"--min-quality {low} and --max-quality {high} leave no document: the minimum must be smaller")
    return Quality(arguments.quality_key, low, high)
