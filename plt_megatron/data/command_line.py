"""Options shared by the commands that read raw text."""

from __future__ import annotations

import argparse

from plt_megatron.data.formats import READERS, ReadOptions, describe_formats

INPUT_HELP = f"files or globs: {describe_formats()}"


def add_reading_arguments(parser: argparse._ActionsContainer) -> None:
    """Options for finding documents in files."""
    parser.add_argument("--format", choices=sorted(READERS), help="default: by the files' suffixes")
    parser.add_argument("--json-key", default="text", help="the field or column with the text (default: text)")
    parser.add_argument(
        "--text-documents",
        choices=("file", "line"),
        default="file",
        help="plain text: a document is a file or a line",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=ReadOptions.max_document_bytes,
        help="a longer line counts as bad (default: 16 MiB)",
    )


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    """The values of those options."""
    return ReadOptions(arguments.json_key, arguments.text_documents, arguments.max_document_bytes)
