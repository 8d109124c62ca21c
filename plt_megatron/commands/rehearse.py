"""Rehearse a large job on this machine, without a GPU: one rank of each kind takes a step with fake tensors.

    plt rehearse configs/runs/loopcoder_7b.yaml --nodes 128 --gpus-per-node 8

docs/estimates.md says which problems it finds and which it cannot.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from plt_megatron.commands import CommandParser
from plt_megatron.errors import UserError, run_command


def _parser() -> CommandParser:
    parser = CommandParser(
        "rehearse",
        description=__doc__,
        epilog="Exit status: 0 nothing found, 1 problems found, 2 something for you to fix.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="a run configuration, as in configs/runs")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a setting to change, as in model.loop_count=3"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default: 8")
    parser.add_argument("--gpu", default="h100", metavar="CARD", help="h100 (default), h200, a100, b200, l40s ...")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="ranks to run at a time; default: the number of cores, at most 4"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every call of every rank")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    return run_command(lambda: _rehearse(arguments))


def _rehearse(arguments: argparse.Namespace) -> int:
    from plt_megatron.config.loader import load_config
    from plt_megatron.data.tokenizer import load_tokenizer
    from plt_megatron.predict.rehearsal.rehearse import rehearse
    from plt_megatron.predict.rehearsal.report import to_json, to_text
    from plt_megatron.predict.run_estimate import known_vocab_size, tokenizer_vocab_size

    for name in ("nodes", "gpus_per_node", "processes"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    config = load_config(arguments.config, arguments.overrides)
    vocab_size = tokenizer_vocab_size(config, lambda path: load_tokenizer(path).vocab_size)
    found = rehearse(
        config,
        known_vocab_size(config, vocab_size),
        world_size=arguments.nodes * arguments.gpus_per_node,
        gpu=arguments.gpu,
        gpus_per_node=arguments.gpus_per_node,
        processes=arguments.processes,
    )
    print(to_json(found) if arguments.json else to_text(found))
    return 1 if found.problems else 0
