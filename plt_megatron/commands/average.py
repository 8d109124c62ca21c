"""Average the weights of checkpoints of one model, saved in any layout, in one process on a CPU.

    plt average runs/mine --last 3 --output averaged
    plt average runs/mine@1000 runs/mine@2000 --weights 1 2 --output averaged

The output is laid out like a run's folder: plt export reads it, and a run starts from its weights with
`checkpoint.load=averaged checkpoint.weights_only=true`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plt_megatron.commands import CommandParser, command


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "The output appears complete or not at all. Exit status: 0 written, 2 something for you to fix."
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="CHECKPOINT",
        help="RUN@STEP, or a checkpoint's folder; with --last, one run's folder",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--last", type=int, metavar="N", help="average the run's last N checkpoints")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[], metavar="W", help="one per checkpoint (default: equal weights)"
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="use the moving averages (training.ema_decay) instead of the weights; one checkpoint is enough",
    )
    parser.add_argument(
        "--dtype", dest="precision", choices=("fp32", "bf16"), help="output precision (default: the last checkpoint's)"
    )


@command("average", __doc__, _arguments, interrupted="interrupted: nothing is written")
def main(arguments: argparse.Namespace) -> None:
    from plt_megatron.hf.arguments import prepare_conversion
    from plt_megatron.hf.averaged_checkpoints import AverageOptions, find_checkpoints

    prepare_conversion()
    options = AverageOptions(**vars(arguments))
    find_checkpoints(options)
    from plt_megatron.hf.averaging import average

    result = average(options)
    shares = ", ".join(f"{share:.4g}" for share in result.shares)
    print(f"{result.checkpoint}: {result.tensors} tensors in {result.precision}, with shares {shares}")
    print(f"start a run from it with checkpoint.load={result.output} checkpoint.weights_only=true")
