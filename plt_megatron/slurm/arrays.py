"""Job arrays of several runs: the members and their shared files."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.launcher.job import JobSettings
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.folder import CONFIG, RunFolder
from plt_megatron.run_folder.text import format_duration, plural
from plt_megatron.slurm import checks, run_files
from plt_megatron.slurm.resources import Resources
from plt_megatron.slurm.run_files import snapshot_code
from plt_megatron.slurm.script import Array

SUFFIX = ".array"


@dataclass(frozen=True)
class Member:
    """A checked run to be submitted."""

    config: RunConfig
    run: Path
    settings: JobSettings
    ahead: checks.Forecast


def config_paths(source: str) -> list[Path]:
    """List the configurations of an array: of a file with one path per line (empty lines and # comments are ignored),
    or of a folder of run folders. Raises `UserError` if there is none, or if the file cannot be read."""
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob(f"*/{CONFIG}"))
        if not found:
            raise UserError(f"--array {source}: no */{CONFIG} in this folder")
        return found
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--array: cannot read {source}: {getattr(error, 'strerror', None) or error}") from error
    found = [Path(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UserError(f"--array {source}: the file names no configuration; list one path per line")
    return found


def check_distinct(runs: Sequence[Path]) -> None:
    """Raise `UserError` if two members would write into the same folder."""
    ((run, count),) = Counter(run.resolve() for run in runs).most_common(1)
    if count > 1:
        raise UserError(f"--array: {count} configurations have the run folder {run}: give each its own name")


def plan_array(
    source: str, runs: Sequence[Path], name: str | None, max_concurrent: int | None, job_of: Callable[[Path], object]
) -> Array:
    """Return the array of these runs; its folder is next to theirs.

    Members read the folder's list when they start, and run its code, also when they are continued by themselves: a
    folder with a pending or running job (`job_of`), its own or a member's, is not reused. The new one gets a number.
    """
    path = Path(source)
    name = name or (path.resolve().name if path.is_dir() else path.stem)
    parent = Path(os.path.commonpath([run.parent for run in runs]))
    stem = name.replace(os.sep, "-")
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    folders = (parent / (stem + SUFFIX) for stem in names)
    folder = next(path for path in folders if all(job_of(each) is None for each in (path, *run_files.members_of(path))))
    return Array(folder, run_files.job_name(folder, name), len(runs), max_concurrent)


def write_array(array: Array, runs: Sequence[Path], script: str, root: Path) -> Path:
    """Write the array's folder, which the caller has locked, and return the snapshot that its members share. Raises
    `UserError` if it cannot be written, or if an array has been submitted from it since this one was planned."""
    folder = RunFolder(array.folder)
    job = run_files.job_of(array.folder, run_files.active_jobs)
    if job is not None:
        raise UserError(f"{array.folder}: another plt submit has just used it for job {job.id}: run this one again")
    with writing(array.folder):
        folder.logs.mkdir(parents=True, exist_ok=True)
        snapshot_code(root, array.folder)
        write_text(array.folder / run_files.RUNS, "".join(f"{run}\n" for run in runs))
        run_files.write_script(array.folder, script)
    return folder.code


def describe_array(array: Array, members: Sequence[Member], resources: Resources) -> list[tuple[str, str]]:
    """Return name and value of each line of the summary about the members."""
    cap = f", at most {array.max_concurrent} at a time" if array.max_concurrent else ""
    rows = [("array", f"{plural(array.members, 'run')}{cap}; {array.folder}")]
    total = 0.0
    for member in members:
        seconds = member.ahead.remaining_seconds
        total += (seconds or 0.0) * resources.world_size / 3600
        duration = format_duration(seconds) if seconds is not None else "unknown time"
        estimate = member.ahead.estimate
        size = f"{estimate.parameters_total:,} parameters, {estimate.tokens:,} tokens"
        rows.append((f"  {member.config.name}", f"{size}, {duration}; {member.run}"))
    if all(member.ahead.remaining_seconds is not None for member in members):
        rows.append(("total", f"{total:,.1f} {'process' if resources.card == 'cpu' else 'GPU'}-hours"))
    return rows
