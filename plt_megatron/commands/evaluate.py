"""Run lm-evaluation-harness tasks on an exported model.

    plt evaluate --model exported --tasks reading,arithmetic --include-path tasks

Prints the scores and stores them in the export's evaluation.json and model card. Reads task data from local files or
Hugging Face's cache; only --download downloads. Python in the model's folder is not run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plt_megatron.commands import CommandParser, command, whole


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "Exit status: 0 evaluated, 2 something for you to fix."
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a folder written by plt export")
    parser.add_argument("--tasks", required=True, type=_names, metavar="NAMES", help="task names, separated by commas")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder of task files")
    parser.add_argument("--download", action="store_true", help="download task data missing from Hugging Face's cache")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="examples per task (default: all)")
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


@command("evaluate", __doc__, _arguments, interrupted="interrupted: nothing is written")
def main(arguments: argparse.Namespace) -> None:
    if not arguments.tasks:
        raise argparse.ArgumentError(None, "--tasks names no task")
    from plt_megatron.extras import require
    from plt_megatron.hf import arguments as checks

    checks.prepare_conversion()
    require("plt evaluate", "lm_eval", "accelerate", "transformers")
    checks.check_export(arguments.model)
    checks.check_file("--include-path", arguments.include_path)
    checks.check_device(arguments.device)
    from plt_megatron.hf.evaluation import check_same, evaluate, keep, weights_of
    from plt_megatron.run_folder.text import format_table

    how = {"limit": arguments.limit, "chat": arguments.chat}
    where = {"device": arguments.device, "download": arguments.download}
    weights = weights_of(arguments.model)
    scores = evaluate(arguments.model, arguments.tasks, arguments.include_path, **how, **where)
    try:  # at once, and both: neither a full disk nor a reader that has left shall lose them
        print(format_table([[name, f"{value:.4f}"] for name, value in scores.items()]), flush=True)
    finally:
        check_same(arguments.model, weights)
        keep(arguments.model, scores, arguments.tasks, **how)
