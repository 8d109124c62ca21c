#!/usr/bin/env python3
"""Continue a text with an exported model, its loops decoded in parallel.

python tools/generate.py --model exported --prompt 'def main():'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plt_megatron.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description="Continue a text with an exported model.")
    parser.add_argument("--model", required=True, metavar="DIR", help="what tools/convert_to_hf.py has written")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from plt_megatron.hf.generation import generate

    text, seconds = generate(
        arguments.model, arguments.prompt, arguments.max_new_tokens, arguments.temperature, arguments.seed
    )
    print(text)
    print(f"[{seconds:.1f} s]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
