#!/usr/bin/env python3
"""Train a small PLT and its one-loop baseline on text this machine already has. Safe to run again."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EXIT_INTERRUPTED = 130


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__,
        epilog="Everything it makes lies in .demo, beside the project's sources; `make clean` removes it.",
    ).parse_args()
    os.chdir(ROOT)

    from plt_megatron.errors import run_command
    from plt_megatron.experiments.demo import run_demo

    try:
        return run_command(run_demo)
    except KeyboardInterrupt:
        print("interrupted: `make demo` goes on where this stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
