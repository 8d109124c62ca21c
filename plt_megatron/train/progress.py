"""What a person sees of a running run: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class ProgressBar:
    """Progress of `total` steps. Only one rank's is enabled."""

    def __init__(self, total: int, enabled: bool) -> None:
        self.total = total
        self._enabled = enabled
        self._started = time.monotonic()
        self._first = 0
        self._bar: Bar | None = None
        if enabled and sys.stdout.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(),
            )

    def start(self, step: int) -> None:
        """Training begins, or goes on, after `step` steps."""
        self._started, self._first = time.monotonic(), step
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=self.total, completed=step, loss="-")
        if step:
            self.say(f"resumed at step {step} of {self.total}")

    def advance(self, step: int, loss: float) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}")

    def report(self, record: dict[str, Any]) -> None:
        """A metrics record, as a line."""
        if record["kind"] == "validation":
            self.say(f"  validation, {record['loop_count']} loop(s): loss {record['loss']:.4f}")
            return
        mfu = "" if record["mfu"] is None else f", MFU {100 * record['mfu']:.1f} %"
        self.say(
            f"step {record['step']}/{self.total}: loss {record['loss']:.4f}, gradient norm {record['grad_norm']:.3f}, "
            f"lr {record['lr']:.2e}, {record['tokens_per_second']:,.0f} tokens/s{mfu}{self._remaining(record)}"
        )

    def _remaining(self, record: dict[str, Any]) -> str:
        done = record["step"] - self._first
        if self._bar is not None or done <= 0 or record["step"] >= self.total:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self.total - record["step"])
        hours, minutes = divmod(int(seconds) // 60, 60)
        return f", {hours}:{minutes:02d}:{int(seconds) % 60:02d} left"

    def say(self, line: str) -> None:
        """A line of text above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
