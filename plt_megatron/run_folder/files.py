"""Write files atomically, whatever stops the writer: a full disk, a kill, a lost node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from plt_megatron.errors import UserError

LOCK = ".lock"
_NO_SYNC = {errno.EINVAL, errno.EACCES, errno.EBADF, errno.EISDIR, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def replacing(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a new file for writing (`w`: UTF-8 text, `wb`: bytes), which replaces `path` if the block succeeds and is
    removed otherwise.

    The new file is beside `path`, whose folder is created, and is flushed to the disk before it is renamed. It has the
    permissions of the file that it replaces.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, not the process's id: writers on several machines may share the folder.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        with contextlib.suppress(FileNotFoundError, PermissionError):  # ZFS and GPFS may refuse it where ACLs rule
            shutil.copymode(path, temporary)
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def publish(temporary: Path, target: Path | str) -> None:
    """Flush a complete file, or a folder of files, to the disk and rename it to `target`.

    Both are on one file system. An existing file or empty folder is replaced. Raises `OSError`.
    """
    target = Path(target)
    for path in (temporary, *temporary.rglob("*")):
        _sync(path)
    temporary.replace(target)
    _sync(target.parent)


def write_text(path: Path | str, text: str) -> None:
    """Write or replace a UTF-8 file atomically. Raises `OSError`."""
    with replacing(path) as file:
        file.write(text)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write or replace a binary file atomically. Raises `OSError`."""
    with replacing(path, "wb") as file:
        file.write(content)


def write_json(path: Path | str, value: Any, *, indent: int | None = 1) -> None:
    """Write or replace a JSON file atomically, with a newline at its end. Raises `OSError`."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_json_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read a JSON file. Raises `UserError`, which ends with `remedy`, if it is not an object; `OSError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter where it is nested deeply
        raise UserError(f"{path} is not valid JSON ({error}){remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object{remedy}")
    return content


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():  # a folder that may not be listed, or cannot be synced
            raise


@contextlib.contextmanager
def locked(folder: Path, what: str, *, wait: bool = False) -> Iterator[IO[str]]:
    """Create and lock a folder in which one process at a time may do `what`: if another does, wait or raise a
    `UserError`.

    Yields the file whose open descriptor is the lock: a process that inherits it holds the lock too.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another {what} is running there; wait for it or stop it") from None
        except OSError as error:  # a network file system without locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(folder / LOCK)) from error
            print(f"warning: cannot lock {folder} ({error.strerror}): start no other {what} there", file=sys.stderr)
        yield file


@contextlib.contextmanager
def writing(target: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an `OSError` in the block into a `UserError` that names its file, or `target` if it has none."""
    try:
        yield
    except OSError as error:
        path, reason = error.filename2 or error.filename or target, error.strerror or error
        if isinstance(error, FileExistsError) and os.path.islink(path) and not os.path.exists(path):
            reason = f"a link to {os.readlink(path)}, which does not exist"
        raise UserError(f"cannot write {path}: {reason}") from error
