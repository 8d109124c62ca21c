"""Progress of a long job: one updated line on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time

from plt_megatron.run_folder.text import format_bytes, format_duration


class ProgressBar:
    """Shows how much of `total` bytes is done, the rates and the time left.

    `done` bytes were done before this run; they count as done but not in the rates.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total = max(total, 1)
        self._before = done
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._width = 0

    def update(self, disk_bytes: int, text_bytes: int, tokens: int) -> None:
        """Show the progress if due: input consumed, text encoded and tokens written in this run."""
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else 10.0):
            return
        self._shown = now
        elapsed = max(now - self._start, 1e-9)
        done = min(self._before + disk_bytes, self._total)
        left = format_duration((self._total - done) * elapsed / disk_bytes) if disk_bytes else "?"
        line = (
            f"{done / self._total:6.1%} of {format_bytes(self._total)}  {format_bytes(text_bytes / elapsed)}/s  "
            f"{tokens / elapsed / 1e6:.2f}M tokens/s  {tokens:,} tokens  "
            f"{format_duration(elapsed)} elapsed, {left} left"
        )
        if self._terminal:
            print(f"\r{line.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line on a terminal."""
        if self._width:
            print(file=sys.stderr, flush=True)
