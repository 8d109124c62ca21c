"""Measure what each loop of a trained model does on held-out text: LoopCoder-v2's diagnostics, and its rule.

    plt diagnose runs/plt2_demo --data heldout.jsonl
    plt diagnose exported --data data/heldout --output diagnostics

Reports step size, update cosine, effective rank, fixed-point gap, offset cost, gates, attention, head diversity and the
logit lens, loop by loop, with 95 % intervals: a table here, and a page, JSON, CSV and PNGs in --output.
docs/diagnostics.md defines each number.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from plt_megatron.commands import CommandParser, command, whole
from plt_megatron.data.formats import ReadOptions, describe_formats, open_inputs


def _arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a run's folder, a checkpoint of any layout, or a Hugging Face folder"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help=f"text the model was not trained on: a .bin/.idx prefix, or a file or glob: {describe_formats()}",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: beside the checkpoint or the model")
    parser.add_argument(
        "--max-tokens", type=whole(2), default=65536, metavar="N", help="tokens to measure on (default: 65536)"
    )
    parser.add_argument(
        "--sequence-length", type=whole(2), metavar="S", help="tokens per sequence (default: the model's, at most 2048)"
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="seed for choosing sequences and the bootstrap (default: 0)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the model's")
    parser.add_argument(
        "--reset-at-document-boundaries",
        dest="reset",
        action=argparse.BooleanOptionalAction,
        help="keep attention within each document (default: as in training; exports: no)",
    )
    parser.add_argument(
        "--dtype",
        dest="precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="the model's precision (default: fp32)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} sequences", end="\n" if done == total else "", file=sys.stderr, flush=True)


@command("diagnose", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    from plt_megatron.extras import require
    from plt_megatron.hf import arguments as checks

    require("plt diagnose", "jinja2", "scipy", "transformers")
    checks.check_model(arguments.model)
    checks.check_file("--tokenizer", arguments.tokenizer)
    if not Path(f"{arguments.data}.idx").is_file() and not arguments.data.endswith((".bin", ".idx")):
        open_inputs([arguments.data], ReadOptions())
    checks.prepare_imports()
    from plt_megatron.experiments.diagnostics.report import DiagnoseOptions, run_diagnosis

    result = run_diagnosis(DiagnoseOptions(**vars(arguments)), _show_progress)
    print(result.text)
    print(f"\n{result.folder}/index.html")
