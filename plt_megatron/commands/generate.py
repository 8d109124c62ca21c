"""Continue a text with an exported model, decoding its loops in parallel.

    plt generate --model exported --prompt 'def main():'

The model runs with this installation's code; Python in its folder is not run.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from plt_megatron.commands import CommandParser, command, whole


def _arguments(parser: CommandParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder written by plt export")
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--chat", action="store_true", help="apply the tokenizer's chat template to the prompt, and print the answer"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=100, help="default 100")
    parser.add_argument("--temperature", type=float, default=0.8, help="default 0.8; 0: greedy decoding")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="default 0")


@command("generate", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.temperature < math.inf:
        raise argparse.ArgumentError(None, "--temperature must be 0 or above")
    from plt_megatron.hf.arguments import check_export, prepare_imports

    check_export(Path(arguments.model))
    prepare_imports()
    from plt_megatron.hf.generation import generate

    settings = (arguments.max_new_tokens, arguments.temperature, arguments.seed)
    found = generate(arguments.model, arguments.prompt, *settings, chat=arguments.chat)
    print(found.text)
    hint = "; the model has a chat template, which --chat applies" if found.has_chat_template > arguments.chat else ""
    print(f"[{found.seconds:.1f} s{hint}]", file=sys.stderr)
