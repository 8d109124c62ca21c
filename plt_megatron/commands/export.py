"""Export a training checkpoint of any layout as a Hugging Face model, in one process on a CPU.

    plt export --checkpoint runs/plt2_1b --output exported --verify

The folder then works with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, offline.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plt_megatron.commands import CommandParser, command
from plt_megatron.run_folder.text import format_bytes, plural


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "The output appears complete or not at all. Exit status: 0 written, 2 something for you to fix."
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a run's folder (its last complete checkpoint), a checkpoint, or a Hugging Face folder to re-export",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", dest="precision", choices=("fp32", "bf16", "fp16"), help="default: the checkpoint's")
    parser.add_argument(
        "--format",
        dest="style",
        choices=("plt", "loopcoder"),
        default="plt",
        help="loopcoder: LoopCoder-v2's names and keys, without modeling code",
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weights file (default: 5GB)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the run's tokenizer, if it has moved")
    parser.add_argument(
        "--ema", action="store_true", help="export the moving average of the weights (training.ema_decay) instead"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run text through the training model and the export; fail if fp32 logits differ by more than 2e-5 of "
        "the largest",
    )


@command("export", __doc__, _arguments, interrupted="interrupted: nothing is written")
def main(arguments: argparse.Namespace) -> None:
    from plt_megatron.extras import require
    from plt_megatron.hf import arguments as checks

    checks.prepare_conversion()
    require("plt export", "transformers")
    checks.check_target(arguments.output)
    checks.check_model(arguments.checkpoint)
    checks.check_file("--tokenizer", arguments.tokenizer)
    checks.parse_size(arguments.max_shard_size)
    from plt_megatron.hf.exporting import ExportOptions, export

    result = export(ExportOptions(**vars(arguments)))
    files = plural(result.files, "file")
    print(f"{result.output}: {result.tensors} tensors, {format_bytes(result.total_bytes)} in {files}")
