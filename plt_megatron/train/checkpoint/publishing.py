"""Publishes checkpoints: each is complete when it gets its name (`run_folder.checkpoints`), and old ones are removed.

One process does all of this; any `OSError` leaves the last checkpoint intact.
"""

from __future__ import annotations

import platform
import re
import secrets
import shutil
from pathlib import Path

import plt_megatron
from plt_megatron.installation import megatron_core_version
from plt_megatron.run_folder.checkpoints import (
    FORMAT,
    LATEST,
    MANIFEST,
    NAME,
    checkpoint_folders,
    folder_name,
    sha256,
    step_of,
    superseded,
)
from plt_megatron.run_folder.files import write_json, write_text

_TEMPORARY = ".tmp"  # being written, or being removed
_REPLACED = ".old"  # about to be replaced by a newer one of the same step
# What is between is a save's own: two starts of a run that both live have two folders.
_LEFT = re.compile(rf"({NAME.pattern})(\.[0-9a-f]+)?({_TEMPORARY}|{_REPLACED})")


def versions() -> dict[str, str]:
    """Return the versions of the software that writes a checkpoint."""
    import torch

    return {
        "plt_megatron": plt_megatron.__version__,
        "megatron-core": megatron_core_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def leftovers(directory: Path) -> list[Path]:
    """Return folders left by a crash, partly written or partly removed."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _LEFT.fullmatch(path.name) and path.is_dir())


def prepare(directory: Path, step: int) -> Path:
    """Remove leftovers, except those that cannot be, and create a temporary folder for step `step`'s checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    recover(directory)
    temporary = directory / f"{folder_name(step)}.{secrets.token_hex(4)}{_TEMPORARY}"
    for path in leftovers(directory):
        _remove(path, ignore_errors=True)  # NFS keeps a folder in which another process has a file open
    for path in directory.glob(f".{LATEST}.*"):
        path.unlink()
    temporary.mkdir()
    return temporary


def _remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder or, if a user has moved it elsewhere, the link to it."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def recover(directory: Path) -> None:
    """Restore checkpoints that a crash left without a name while they were being replaced by one of the same step."""
    for path in leftovers(directory):
        if path.suffix == _REPLACED and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))


def publish(temporary: Path, checksums: dict[str, str]) -> Path:
    """Make a complete temporary folder the run's latest checkpoint. `checksums` has the SHA-256 of the files whose
    writers have computed it; it is computed here for the others."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": checksums.get(path.name) or sha256(path, sync=True)}
        for path in sorted(temporary.iterdir())
    }
    missing = checksums.keys() - files.keys()
    if missing:
        raise FileNotFoundError(
            2, "files written by another process are missing: is the folder shared by all nodes?", missing.pop()
        )
    write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})
    published = temporary.with_name(temporary.name.partition(".")[0])
    if published.exists():
        replaced = published.with_suffix(_REPLACED)
        published.rename(replaced)
        temporary.rename(published)
        _remove(replaced, ignore_errors=True)
    else:
        temporary.rename(published)
    write_text(published.parent / LATEST, published.name + "\n")  # also flushes the renamed folder to the disk
    return published


def prune(published: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove the checkpoints that need not be kept (`superseded`), `published` being the newest; return those."""
    found = checkpoint_folders(published.parent)
    steps = superseded([step_of(path) for path in found], step_of(published), keep_last, keep_every)
    removed = [path for path in found if step_of(path) in steps]
    for path in removed:
        # Renamed first: a crash in between leaves no damaged folder under a checkpoint's name.
        doomed = path.rename(path.with_suffix(_TEMPORARY))
        _remove(doomed)
    return removed
