"""Rehearse a large job on this machine, without a GPU: one rank of each kind takes a step with fake tensors.

    plt rehearse configs/runs/loopcoder_7b.yaml --nodes 128 --gpus-per-node 8

docs/estimates.md says which problems it finds and which it cannot.
"""

from __future__ import annotations

import argparse

from plt_megatron.commands import CommandParser, command, whole


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "Exit status: 0 nothing found, 1 problems found, 2 something for you to fix."
    parser.add_config()
    parser.add_argument("--nodes", type=whole(1), default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=whole(1), default=8, metavar="G", help="default: 8")
    parser.add_argument("--gpu", default="h100", metavar="CARD", help="h100 (default), h200, a100, b200, l40s ...")
    parser.add_argument(
        "--processes",
        type=whole(1),
        metavar="N",
        help="ranks to run at a time; default: the number of cores, at most 4",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every call of every rank")


@command("rehearse", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    from plt_megatron.config.loader import load_config
    from plt_megatron.data.tokenizer import load_tokenizer
    from plt_megatron.predict.rehearsal.rehearse import rehearse
    from plt_megatron.predict.rehearsal.report import to_json, to_text
    from plt_megatron.predict.run_estimate import known_vocab_size

    config = load_config(arguments.config, arguments.overrides)
    found = rehearse(
        config,
        known_vocab_size(config, lambda path: load_tokenizer(path).vocab_size),
        world_size=arguments.nodes * arguments.gpus_per_node,
        gpu=arguments.gpu,
        gpus_per_node=arguments.gpus_per_node,
        processes=arguments.processes,
    )
    print(to_json(found) if arguments.json else to_text(found))
    return 1 if found.problems else 0
