"""Files with one JSON object per line that are appended to while others read them.

A line counts once its newline is written. A crash or a full disk may leave half a line: the next record starts a new
line, and readers that must go on skip the broken one (`read` with `skip_broken`, `last`, `rewind`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import replacing

Record = dict[str, Any]
_TAIL_BYTES = 1 << 17  # at a file's end that are searched for the last records first


def append(path: Path, record: Record, *, sync: bool = False) -> None:
    """Append a record, with null for numbers that are not finite. `sync`: flush it to the disk. Raises `OSError`."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        torn = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(finite(record)).encode() + b"\n")
        if sync:
            file.flush()
            os.fsync(file.fileno())


def finite(value: Any, other: Callable[[float], Any] = lambda number: None) -> Any:
    """Replace the numbers that JSON lacks, NaN and infinity, by null or what `other` returns for them."""
    if isinstance(value, dict):
        return {key: finite(item, other) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, other) for item in value]
    return other(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path, *, skip_broken: bool = False) -> list[Record]:
    """Read the records of a file; none if it does not exist.

    Raises:
        UserError: a line is not a JSON object; with `skip_broken` it is skipped.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines[:-1], 1):
        record = parse(line)
        if record is not None:
            records.append(record)
        elif not skip_broken:
            raise UserError(f"{path}: line {number} is not a JSON object")
    return records


def last(path: Path, count: int, wanted: Callable[[Record], bool] = lambda record: True) -> list[Record]:
    """Return the last `count` records that are `wanted`, oldest first, from the file's last 128 KiB, or more if these
    hold no whole line. Broken lines are skipped; an unreadable file has none."""
    lines = _last_lines(path)
    records: list[Record] = []
    while lines and len(records) < count:
        record = parse(lines.pop())
        if record is not None and wanted(record):
            records.append(record)
    return records[::-1]


def _last_lines(path: Path) -> list[bytes]:
    size = _TAIL_BYTES
    while True:
        text = tail(path, size)
        *lines, _ = text.split(b"\n")
        if len(lines) > 1 or len(text) < size:  # the first may be cut
            return lines
        size *= 4


def tail(path: Path, size: int, start: int = 0) -> bytes:
    """Return the last `size` bytes of a file, or those from byte `start` on; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - size))
            return file.read()
    except OSError:
        return b""


def rewind(path: Path, keep: Callable[[Record], bool]) -> None:
    """Drop all records but those to `keep`, and broken lines, atomically: a reader sees the old file or the new one."""
    if not path.exists():
        return
    with path.open("rb") as lines, replacing(path, "wb") as file:
        for line in lines:
            record = parse(line) if line.endswith(b"\n") else None
            if record is not None and keep(record):
                file.write(line)


def parse(line: bytes) -> Record | None:
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return None


class Follower:
    """Follows a growing file, returning each complete line once; with `from_end`, without those that exist. The file
    need not exist yet.

    Attributes:
        replaced: whether the last call found another file of this name. It is followed from its end on, because a
            rewound file has old lines.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._inode, self._offset = 0, 0
        self.replaced = False
        if from_end:
            with contextlib.suppress(OSError):
                found = path.stat()
                self._inode, self._offset = found.st_ino, found.st_size

    def lines(self) -> list[str]:
        """Return the lines completed since the last call, without their line ends."""
        self.replaced = False
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                self.replaced = self._inode not in (0, found.st_ino)
                self._inode = found.st_ino
                if self.replaced:
                    self._offset = found.st_size
                    return []
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()
