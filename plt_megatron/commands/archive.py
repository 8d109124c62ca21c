"""Pack the records of finished runs into one file, for a repository.

    plt archive runs/sweeps/paper_ablation results/paper_ablation

Writes records.tar.xz to OUTPUT; plt report, plt study --report and benchmarks read it as it is. The runs stay where
they are; checkpoints, exports, logs, figures and reports are left out. The same records give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plt_megatron.commands import CommandParser, command
from plt_megatron.errors import UserError
from plt_megatron.run_folder.archive import ARCHIVE, write_archive


def _arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of a sweep or study; or of several, read only when unpacked"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the archive; may be FOLDER")


@command("archive", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    from plt_megatron.experiments.records import note_finished, state_of
    from plt_megatron.experiments.sweep_plan import FILE_NAME, load_plan

    folder, target = arguments.folder, arguments.output / ARCHIVE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for plan in sorted(folder.rglob(FILE_NAME)):
        # The archive has no checkpoints: what ran as a Slurm job is known as finished by this note alone.
        note_finished(run for run in load_plan(plan.parent).runs if state_of(run) == "finished")
    count = write_archive(folder, target)
    print(f"{target}: {count} files, {target.stat().st_size:,} bytes")
