"""The job's log files. Restarts append; every line says when, which attempt and which rank."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from plt_megatron.run_folder.folder import RunFolder

_TAIL_BYTES = 1 << 14  # of the end of a job's output, in which its last lines are sought
_SHELL = re.compile(r"^\S*: line \d+: ")  # where in its script bash met with what it reports


def rank_log(run: Path, rank: int) -> Path:
    """The log of one rank."""
    return RunFolder(run).logs / f"rank-{rank:04d}.log"


def merged_log(run: Path) -> Path:
    """The log of all ranks, in order of arrival."""
    return RunFolder(run).logs / "merged.log"


def own_output() -> Path | None:
    """The file that this process writes its errors to: of a batch script and its children the job's output, unless
    sbatch was told otherwise."""
    path = Path(os.path.realpath("/proc/self/fd/2"))
    return path if path.is_file() else None


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a text file that are not empty, bash's without their place in the script; none if it cannot be
    read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [_SHELL.sub("", line.rstrip()) for line in text.splitlines() if line.strip()]
    return lines[-count:]


def stamp(attempt: int, who: str, text: str) -> str:
    """A line of a log."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} attempt {attempt} {who}: {text}"


class LogFile:
    """A file that whole lines are appended to. A full disk costs lines, never the run.

    Attributes:
        lost: lines that could not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        self._torn = False

    def write(self, lines: Iterable[str]) -> None:
        """Append lines."""
        lines = list(lines)
        if not lines:
            return
        if self.lost:
            lines.insert(0, f"... {self.lost} lines are missing here: the disk was full or unavailable")
        data = ("\n" if self._torn else "") + "".join(f"{line}\n" for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened each time: the file may be moved away, and a disk may come back.
            with self.path.open("ab", buffering=0) as file:
                encoded = data.encode(errors="replace")
                self._torn = file.write(encoded) != len(encoded)
            self.lost = 0
        except OSError:
            self.lost += len(lines)
