"""Queue of exports and checkpoints to be uploaded, in a run's folder.

    uploading/
      exports/step_00000100/          an export that is waiting, or whose upload has failed
      checkpoints/step_00000100/      a checkpoint, likewise
      checkpoints/step_00000050.now/  being uploaded, or was when its process ended

Files are hard links: they take no space until the run removes its own copies, and outlive them. Where a file system
refuses links, files are copies.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.run_folder.checkpoints import NAME, step_of
from plt_megatron.run_folder.folder import RunFolder

EXPORT, CHECKPOINT = "export", "checkpoint"  # kinds
_FOLDERS = {EXPORT: "exports", CHECKPOINT: "checkpoints"}
_NOW = ".now"
_TEMPORARY = ".tmp"
_ABANDONED_S = 3600.0
_BLOCK = 1 << 24
COPYING_S = 60.0  # that a run may take for copies, for which its other ranks wait


def link_folder(source: Path, target: Path, seconds: float = math.inf) -> None:
    """Make `target` a folder of hard links to the files of `source`, or of copies, atomically. Raises `OSError`, also
    if copies take more than `seconds`."""
    partial, until = target.with_suffix(_TEMPORARY), time.monotonic() + seconds
    shutil.rmtree(partial, ignore_errors=True)
    remove(target)
    try:
        partial.mkdir(parents=True)
        for path in sorted(source.rglob("*")):  # folders before what is in them
            made = partial / path.relative_to(source)
            if path.is_dir():
                made.mkdir()
            else:
                _link(path, made, until)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _link(source: Path, target: Path, until: float) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        _copy(source, target, until)  # no hard links, or a folder of another file system


def _copy(source: Path, target: Path, until: float) -> None:
    with source.open("rb") as original, target.open("wb") as copy:
        while block := original.read(_BLOCK):
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, "hard links are refused, and a copy takes too long", str(target))
            copy.write(block)


def remove(folder: Path) -> None:
    """Remove a folder, if there is one; renamed first, it is whole or gone. Raises `OSError`."""
    # A name of its own: NFS keeps a folder in which another process has a file open.
    doomed = folder.with_suffix(f".{secrets.token_hex(4)}{_TEMPORARY}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@dataclass(frozen=True)
class Waiting:
    """An export or checkpoint in the queue. `folder` may have been renamed since."""

    kind: str
    step: int
    folder: Path


def clear_leftovers(folder: Path) -> None:
    """Remove what interrupted links and removals have left in a folder, with the space of checkpoints long gone."""
    for path in folder.glob(f"step_*{_TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:  # else plt upload may be making it
                shutil.rmtree(path, ignore_errors=True)


class UploadQueue:
    """The upload queue of a run. One process adds to it, and another one uploads."""

    def __init__(self, run: RunFolder) -> None:
        self.path = run.uploading

    def clear_leftovers(self) -> None:
        for kind in _FOLDERS:
            clear_leftovers(self._folder(kind))

    def add(self, kind: str, folder: Path, seconds: float = math.inf) -> None:
        """Queue a finished folder, replacing an earlier one of the same step. Errors: see `link_folder`."""
        waiting = self._folder(kind) / folder.name
        remove(waiting.with_suffix(_NOW))
        link_folder(folder, waiting, seconds)

    def waiting(self) -> list[Waiting]:
        """List all entries: first those being uploaded, then exports before checkpoints, earlier steps before later."""
        found = [
            Waiting(kind, step_of(path.with_suffix("")), path)
            for kind in _FOLDERS
            for path in self._folder(kind).glob("step_*")
            if path.suffix in ("", _NOW) and NAME.fullmatch(path.stem) and path.is_dir()
        ]
        return sorted(found, key=lambda entry: (entry.folder.suffix != _NOW, entry.kind == CHECKPOINT, entry.step))

    def begin(self, entry: Waiting) -> Waiting | None:
        """Take an entry for upload, so that it is not dropped; None if it is gone."""
        taken = entry.folder.with_suffix(_NOW)
        try:
            entry.folder.rename(taken)
        except FileNotFoundError:
            return None
        return Waiting(entry.kind, entry.step, taken)

    def put_back(self, entry: Waiting) -> None:
        """Put back an entry whose upload has failed."""
        waiting = entry.folder.with_suffix("")
        if entry.folder.is_dir() and not waiting.exists():
            entry.folder.rename(waiting)

    def done(self, entry: Waiting) -> None:
        remove(entry.folder)

    def drop_older_checkpoints(self, step: int, keep_every: int) -> None:
        """Drop waiting checkpoints before `step`, except permanent ones, since uploads may be slower than saves."""
        for entry in self.waiting():
            permanent = keep_every > 0 and entry.step % keep_every == 0
            if entry.kind == CHECKPOINT and entry.step < step and not permanent and entry.folder.suffix != _NOW:
                with contextlib.suppress(OSError):  # one that stays is uploaded
                    remove(entry.folder)

    def drop_after(self, step: int) -> None:
        """Remove entries after `step`, which belong to a course of training that was rolled back."""
        for entry in self.waiting():
            if entry.step > step:
                remove(entry.folder)

    def _folder(self, kind: str) -> Path:
        return self.path / _FOLDERS[kind]
