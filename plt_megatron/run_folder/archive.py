"""The records of finished runs in one file, `records.tar.xz`, which spares a repository thousands of small ones.

Reports read it as it is. It is never added to: whatever continues its runs unpacks it first.
"""

from __future__ import annotations

import functools
import io
import lzma
import re
import shlex
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import replacing, writing
from plt_megatron.run_folder.metrics import METRICS

ARCHIVE = "records.tar.xz"
# Folders of a run or sweep that hold no runs.
_WITHOUT_RUNS = {
    *("checkpoints", "code", "logs", "tensorboard", "index_cache", "incidents", "exports", "exporting"),
    *("uploading", "loaded", "wandb"),
}
# Folders that no report reads, or that reports write themselves.
_UNREAD = _WITHOUT_RUNS - {"incidents"} | {"profile", "report"}
_SUFFIXES = {".distcp", ".log", ".md", ".png", ".safetensors", ".xz"}
# Records of the place and the code, with paths, names of users and a cluster's variables; no report reads them.
_PRIVATE = re.compile(
    r"(environment|git|why|runs|array|hang_rank_\d+)\.txt|job\.(sbatch|yaml)"
    r"|(submissions|uploads)\.jsonl|(upload|wandb)_id"
)
# Matches up to 32 MiB apart: a run's configuration and its copy in the plan are stored once.
_PRESET: Final = 8 | lzma.PRESET_EXTREME


def write_archive(folder: Path, archive: Path) -> int:
    """Pack the records of all runs in a folder; return the number of files. The same records give the same bytes.

    Raises:
        UserError: there are no records, or the archive cannot be written.
    """
    paths = sorted(_records(folder))
    if not any(path.name == METRICS for path in paths):
        raise UserError(f"{folder}: no records of runs to archive; give the folder of a sweep or study that has begun")
    with (
        writing(archive),
        replacing(archive, "wb") as file,
        lzma.open(file, "wb", preset=_PRESET) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as packed,
    ):
        for path in paths:
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())  # without times and owners
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    return len(paths)


def _records(folder: Path) -> Iterator[Path]:
    for at, folders, names in folder.walk(follow_symlinks=True):
        above = [other for other in at.parents if other.is_relative_to(folder)]
        if at.is_symlink() and any(other.resolve().is_relative_to(at.resolve()) for other in above):
            folders.clear()  # a link to a folder that it lies in, perhaps by way of another link
            continue
        folders[:] = _below(folders, names, _UNREAD)
        kept = (name for name in names if Path(name).suffix not in _SUFFIXES and not _PRIVATE.fullmatch(name))
        paths = (at / name for name in kept if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # not a link that leads nowhere


def folders_with_runs(folders: Iterable[str], files: Collection[str]) -> list[str]:
    """Return those of a folder's subfolders that may hold runs. `files`: the names of its files."""
    return _below(folders, files, _WITHOUT_RUNS)


def _below(folders: Iterable[str], files: Collection[str], inner: Collection[str]) -> list[str]:
    # Elsewhere the same names are those of runs and sweeps.
    is_run_or_sweep = METRICS in files or any(name.endswith((".yaml", ".sbatch")) for name in files)
    left_out = inner if is_run_or_sweep else ()
    # A second snapshot of an array's code is code.1.
    return [name for name in folders if re.sub(r"\.\d+$", "", name) not in left_out and not name.startswith(".")]


def unpack_command(folder: Path) -> str:
    """Return the shell command that unpacks the folder's archive in place."""
    return shlex.join(["tar", "-C", str(folder), "-xf", str(folder / ARCHIVE)])


def unpacked(archive: Path) -> Path:
    """Return a temporary copy of an archive's files, made once in this process and removed when it ends.

    Raises:
        UserError: the archive is broken, or there is no room for the copy.
    """
    return Path(_unpacked(archive.resolve(), archive.stat().st_mtime_ns).name)


@functools.cache
def _unpacked(archive: Path, _changed: int) -> tempfile.TemporaryDirectory[str]:
    copy = tempfile.TemporaryDirectory(prefix="records-")
    try:
        with tarfile.open(archive, "r:xz") as packed:
            packed.extractall(copy.name, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{archive}: broken ({error}); restore it") from error
    except OSError as error:
        place = Path(copy.name).parent
        raise UserError(f"{archive}: cannot be unpacked to {place} ({error.strerror}); set TMPDIR") from error
    return copy
