"""Checkpoints as folders on disk: names, publishing, checksums, and which one is the last whole one.

    checkpoints/
      step_00000100/     a whole checkpoint; manifest.json lists its files with size and SHA-256
      step_00000200.tmp/ one being written, or what a crash left of it
      latest             the name of the one published last

A checkpoint appears under its name only when it is complete. This module needs neither torch nor megatron.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
LATEST = "latest"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".tmp"  # being written, or being removed
_REPLACED = ".old"  # about to give way to a newer one of the same step
_CHUNK = 1 << 20


def folder_name(step: int) -> str:
    """`step_00000100` for step 100."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step a checkpoint's folder is named for."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def checkpoint_folders(directory: Path) -> list[Path]:
    """The published checkpoints of a run, by step. Published does not yet mean undamaged: see `damage`."""
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def leftovers(directory: Path) -> list[Path]:
    """Folders a crash left behind, half written or half removed."""
    if not directory.is_dir():
        return []
    names = (rf"{_NAME.pattern}({re.escape(suffix)})" for suffix in (_TEMPORARY, _REPLACED))
    pattern = re.compile("|".join(names))
    return sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


def candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` may mean, the one to prefer first.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run's folder. In a folder the one `latest` names comes first,
            then the earlier ones: later ones belong to a course of training that was given up.
    """
    if _NAME.fullmatch(path.name) or (path / MANIFEST).is_file():
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = checkpoint_folders(directory)[::-1]
    named = _pointed_at(directory)
    if named is not None and named in found:
        return found[found.index(named) :]
    return found


def latest_checkpoint(path: Path | str, verify: bool = True) -> Path | None:
    """The last whole checkpoint of a run; None if there is none.

    Args:
        path: a run's folder, its folder of checkpoints, or a checkpoint.
        verify: check every file's SHA-256, and name each damaged checkpoint in the log; otherwise believe the names.
    """
    for candidate in candidates(Path(path)):
        problem = damage(candidate) if verify else None
        if problem is None:
            return candidate
        logger.warning("%s", problem)
    return None


def _pointed_at(directory: Path) -> Path | None:
    try:
        name = (directory / LATEST).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return directory / name if _NAME.fullmatch(name) else None


# Damage.


def damage(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a published checkpoint, in one line that names it; None if it is whole.

    Args:
        part, parts: check the checksums of every `parts`-th file only, from the `part`-th on, so that ranks can share
            the work.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"checkpoint {path}: {name} is damaged, {size} bytes instead of {entry['bytes']}"
        for name in sorted(files)[part::parts]:
            if sha256(path / name) != files[name]["sha256"]:
                return f"checkpoint {path}: {name} is damaged, its SHA-256 is not the manifest's"
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        return f"checkpoint {path}: {missing} is missing" if path.is_dir() else f"checkpoint {path}: not found"
    except OSError as error:
        return f"checkpoint {path}: cannot be read, {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"checkpoint {path}: {MANIFEST} is damaged"
    return None


def sha256(path: Path, sync: bool = False) -> str:
    """Hex digest of a file; `sync` also has it reach the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
        if sync:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def read_progress(path: Path | str) -> dict[str, Any]:
    """What a checkpoint says of its run: `step`, what the trainer counts, `config`, `versions`, `layout`, ...

    Args:
        path: a checkpoint, or a run's folder for its last whole one.

    Raises:
        UserError: there is no whole checkpoint at `path`.
    """
    found = latest_checkpoint(path)
    if found is None:
        raise UserError(f"{path}: no whole checkpoint there")
    return read_verified_progress(found)


def read_verified_progress(checkpoint: Path) -> dict[str, Any]:
    """`read_progress` of a checkpoint already known to be whole."""
    progress: dict[str, Any] = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    if progress["format"] > FORMAT:
        raise UserError(
            f"checkpoint {checkpoint}: its format {progress['format']} is newer than this program; update it"
        )
    return progress


# Writing. All of it is done by one process; any OSError leaves the last checkpoint intact.


def prepare(directory: Path, step: int) -> Path:
    """Clear what crashes left behind and make the temporary folder that becomes step `step`'s checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    recover(directory)
    for path in leftovers(directory):
        shutil.rmtree(path)
    temporary = directory / (folder_name(step) + _TEMPORARY)
    temporary.mkdir()
    return temporary


def recover(directory: Path) -> None:
    """Put back checkpoints that a crash left without a name, on their way out for a newer one of the same step."""
    for path in leftovers(directory):
        if path.suffix == _REPLACED and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))


def discard(temporary: Path) -> None:
    """Remove a temporary folder, as far as that works: its disk space may be needed."""
    shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, checksums: dict[str, str]) -> Path:
    """Make a complete temporary folder the run's latest checkpoint.

    Args:
        checksums: SHA-256 of the files whose writers have computed it; the others' are computed here.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": checksums.get(path.name) or sha256(path, sync=True)}
        for path in sorted(temporary.iterdir())
    }
    missing = checksums.keys() - files.keys()
    if missing:
        raise FileNotFoundError(2, "another process has written what is not there: a folder not shared?", missing.pop())
    write_synced(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync_folder(temporary)
    published = temporary.with_suffix("")
    if published.exists():
        replaced = published.with_suffix(_REPLACED)
        published.rename(replaced)
        temporary.rename(published)
        shutil.rmtree(replaced)
    else:
        temporary.rename(published)
    pointer = published.parent / (LATEST + _TEMPORARY)
    write_synced(pointer, published.name + "\n")
    pointer.replace(published.parent / LATEST)
    _sync_folder(published.parent)
    return published


def prune(published: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove the checkpoints that need not be kept, `published` being the newest; returns those removed.

    Kept are the last `keep_last` and, if `keep_every` > 0, those whose step is a multiple of it. Later ones than
    `published` go: they belong to a course of training that was given up.
    """
    found = checkpoint_folders(published.parent)
    current = [path for path in found if step_of(path) <= step_of(published)]
    kept = set(current[-max(1, keep_last) :])
    if keep_every > 0:
        kept |= {path for path in current if step_of(path) % keep_every == 0}
    removed = [path for path in found if path not in kept]
    _remove(removed)
    return removed


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        # Renamed first: a crash in between leaves no damaged folder under a checkpoint's name.
        doomed = path.rename(path.with_suffix(_TEMPORARY))
        shutil.rmtree(doomed)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and have it reach the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    """Have a folder's entries reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
