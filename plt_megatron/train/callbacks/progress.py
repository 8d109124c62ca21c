"""Shows a run's progress: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from plt_megatron.config import derived
from plt_megatron.run_folder.text import format_duration, plural
from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.engine import StepResult


class ProgressBar(Callback):
    """Progress display of the first rank."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._started = time.monotonic()
        self._first = 0  # tokens
        self._bar: Bar | None = None
        if sys.stdout.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(),
            )

    def on_start(self) -> None:
        step, total = self.run.clock.step, self.run.last_step
        self._started, self._first = time.monotonic(), self.run.clock.tokens
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=total, completed=step, loss="-")
        if step:
            self.say(f"resumed at step {step} of {total}")

    def after_step(self, step: Step, result: StepResult) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step.number, loss=f"{result.loss:.4f}")

    def on_record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "validation":
            average = f", EMA loss {record['ema_loss']:.4f}" if "ema_loss" in record else ""
            self.say(f"  validation, {record['loop_count']} loop(s): loss {record['loss']:.4f}{average}")
        elif record["kind"] == "evaluation":
            scores = ", ".join(f"{name} {value:.4f}" for name, value in record["scores"].items())
            self.say(f"  evaluation of step {record['step']}: {scores}")
        elif record["kind"] == "train":
            self._say_step(record)

    def _say_step(self, record: dict[str, Any]) -> None:
        loops = f" ({plural(record['loop_count'], 'loop')})" if "loop_count" in record else ""
        mfu = "" if record["mfu"] is None else f", MFU {100 * record['mfu']:.1f} %"
        self.say(
            f"step {record['step']}/{self.run.last_step}: loss {record['loss']:.4f}{loops}, "
            f"gradient norm {record['grad_norm']:.3f}, lr {record['lr']:.2e}, "
            f"{record['tokens_per_second']:,.0f} tokens/s{mfu}{self._remaining(record)}"
        )

    def _remaining(self, record: dict[str, Any]) -> str:
        done = record["tokens"] - self._first
        left = derived.tokens_left(self.run.config, record["step"], record["tokens"])
        if self._bar is not None or done <= 0 or left <= 0:
            return ""
        return f", {format_duration((time.monotonic() - self._started) / done * left)} left"

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
