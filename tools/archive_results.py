#!/usr/bin/env python3
"""Pack the records of finished runs into one file, to keep them in a repository.

    python tools/archive_results.py runs/sweeps/paper_ablation results/paper_ablation

OUTPUT gets records.tar.xz, which plt report, plt study --report and benchmarks read as it is. The runs stay where they
are; checkpoints, exports, logs, figures and reports are left out. The same records give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plt_megatron.errors import UserError, run_command
from plt_megatron.run_folder.archive import ARCHIVE, write_archive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a sweep or a study, or of several")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder of the archive; may be FOLDER")
    arguments = parser.parse_args()
    return run_command(lambda: _archive(arguments.folder, arguments.output))


def _archive(folder: Path, output: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    count = write_archive(folder, output / ARCHIVE)
    print(f"{output / ARCHIVE}: {count} files, {(output / ARCHIVE).stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
