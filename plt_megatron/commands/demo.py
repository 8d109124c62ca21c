"""Train a small PLT and its one-loop baseline on text this machine already has. Safe to run again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from plt_megatron.errors import run_command

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        description=__doc__, epilog="Everything it makes is in .demo, in the current folder."
    ).parse_args(argv)
    from plt_megatron.experiments.demo import run_demo

    try:
        return run_command(run_demo)
    except KeyboardInterrupt:
        print("interrupted: run it again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
