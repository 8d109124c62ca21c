"""Where the time of a step goes, and a profiler's trace of chosen steps."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from plt_megatron.config.schema import LoggingConfig


class StepTimes:
    """Adds up host seconds by name. What runs on a GPU counts where the host waits for it: loss and gradient norm are
    read in every step, so forward and backward are whole, and so is the optimizer but for its last kernels."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a block. Blocks may lie in one another: each then counts its own whole time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def count_step(self) -> None:
        """A step is done."""
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Mean seconds per step of each block since the last call."""
        steps = max(1, self._steps)
        means = {name: seconds / steps for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._steps = 0
        return means


class StepProfiler:
    """Records `torch.profiler` traces of the steps (profile_step_start, profile_step_end] on the chosen ranks.

    A trace is a Chrome trace (open it in Perfetto or chrome://tracing): `profile/rank_0000_steps_5-7.json.gz` in the
    run's folder.
    """

    def __init__(self, logging: LoggingConfig, folder: Path, rank: int) -> None:
        self._first, self._last = logging.profile_step_start, logging.profile_step_end
        self._wanted = self._last > self._first and rank in logging.profile_ranks
        self._path = folder / "profile" / f"rank_{rank:04d}_steps_{self._first + 1}-{self._last}.json.gz"
        self._profiler: Any = None

    def at_step(self, step: int) -> Path | None:
        """`step` steps are done: begin or end the trace if it is time. Returns a finished trace's file."""
        if not self._wanted:
            return None
        if self._profiler is None and self._first <= step < self._last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profiler.start()
        elif self._profiler is not None and step >= self._last:
            return self.close()
        return None

    def close(self) -> Path | None:
        """Write the trace that is being recorded, whole or not; returns its file."""
        if self._profiler is None:
            return None
        self._wanted = False
        self._profiler.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
        return self._path
