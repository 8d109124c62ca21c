#!/usr/bin/env python3
"""How runs stand: their jobs' state, steps, speed, time left, restarts and why, last checkpoint.

    python launch/status.py                # all runs in runs/
    python launch/status.py runs/plt2_1b   # one, or all below a folder

Asks Slurm and the runs' folders; where Slurm is not there, the folders alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plt_megatron.errors import run_command  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How runs stand, from Slurm and from their folders.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, or folders that hold some; default: all")
    parser.add_argument("--output-dir", default="runs", metavar="DIR", help="where runs lie; default: runs")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from plt_megatron.slurm.status import report

    print(report(arguments.runs, arguments.output_dir, arguments.json))


if __name__ == "__main__":
    sys.exit(run_command(main))
