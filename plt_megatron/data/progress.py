"""Progress of a long job: one updated line on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from plt_megatron.run_folder.text import format_bytes, format_duration


class ProgressBar:
    """Shows how much of `total` bytes is done, the rates and the time left.

    `done` bytes were done before this run; they count as done but not in the rates.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None, log_interval: float = 10.0) -> None:
        self._total = max(total, 1)
        self._before = done
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else log_interval
        self._start = time.monotonic()
        self._shown = self._start
        self._width = 0

    def update(self, disk_bytes: int, text_bytes: int, tokens: int) -> None:
        """Show the progress if due: input consumed, text encoded and tokens written in this run."""
        now = time.monotonic()
        if now - self._shown < self._interval:
            return
        self._shown = now
        elapsed = max(now - self._start, 1e-9)
        done = min(self._before + disk_bytes, self._total)
        left = (self._total - done) * elapsed / disk_bytes if disk_bytes else None
        self._show(
            f"{done / self._total:6.1%} of {format_bytes(self._total)}  {format_bytes(text_bytes / elapsed)}/s  "
            f"{tokens / elapsed / 1e6:.2f}M tokens/s  {tokens:,} tokens  "
            f"{format_duration(elapsed)} elapsed, {format_duration(left) if left is not None else '?'} left"
        )

    def _show(self, line: str) -> None:
        end = "" if self._terminal else "\n"
        start = "\r" if self._terminal else ""
        self._stream.write(start + line.ljust(self._width) + end)
        self._stream.flush()
        self._width = len(line) if self._terminal else 0

    def close(self) -> None:
        """End the line on a terminal."""
        if self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
