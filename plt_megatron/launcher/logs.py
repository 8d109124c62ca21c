"""The job's log files. Restarts append; every line says when, which attempt and which rank."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from plt_megatron.run_folder.folder import RunFolder


def rank_log(run: Path, rank: int) -> Path:
    """The log of one rank."""
    return RunFolder(run).logs / f"rank-{rank:04d}.log"


def merged_log(run: Path) -> Path:
    """The log of all ranks, in order of arrival."""
    return RunFolder(run).logs / "merged.log"


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
