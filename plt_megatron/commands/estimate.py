"""Calculate what a run needs and costs: parameters, FLOPs, memory, traffic, time, decoding.

    plt estimate configs/runs/plt2_1b.yaml --nodes 8 --gpus-per-node 8
    plt estimate configs/runs/loopcoder_7b.yaml --nodes 16 --search

docs/estimates.md says how each figure is calculated and how far to trust it.
"""

from __future__ import annotations

import argparse

from plt_megatron.commands import CommandParser, command, whole


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "Exit status: 0 done, 1 --search found no layout that fits, 2 something for you to fix."
    parser.add_config()
    parser.add_argument("--gpu", default="h100", metavar="CARD", help="h100 (default), h200, a100, b200, l40s, cpu ...")
    parser.add_argument(
        "--layout", metavar="LAYOUT", help="as reports print it: 'TP2 SP PP4 CP2 DP8 MB1 full', 'TP2 DP8 ZeRO3 offload'"
    )
    parser.add_argument("--nodes", type=whole(1), metavar="N", help="default: as many as the layout needs")
    parser.add_argument("--gpus-per-node", type=whole(1), default=8, metavar="G", help="default: 8")
    parser.add_argument(
        "--context", type=whole(1), metavar="TOKENS", help="context length when decoding; default: the sequence length"
    )
    parser.add_argument(
        "--batch", type=whole(1), default=1, metavar="SEQUENCES", help="batch size when decoding; default: 1"
    )
    parser.add_argument("--search", action="store_true", help="propose layouts that fit on these cards, best first")
    parser.add_argument(
        "--top", type=whole(1), default=10, metavar="N", help="layouts that --search shows; default: 10"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


@command("estimate", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    from plt_megatron.data.tokenizer import load_tokenizer
    from plt_megatron.predict.report import print_estimate

    return print_estimate(arguments, lambda path: load_tokenizer(path).vocab_size)
