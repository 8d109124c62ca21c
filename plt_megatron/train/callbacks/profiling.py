"""`torch.profiler` traces of chosen steps.

A trace is a Chrome trace (open it in Perfetto or chrome://tracing): `profile/rank_0000_steps_5-7.json.gz` in the run's
folder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from plt_megatron.config.schema import ProfileConfig
from plt_megatron.train.callbacks.base import Callback, Run, Step


class Profiling(Callback):
    """Traces the steps (step_start, step_end] of `logging.profile` on the chosen ranks."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        settings, rank = run.config.logging.profile or ProfileConfig(0, ranks=[]), dist.get_rank()
        self._first, self._last = settings.step_start, settings.step_end
        self._wanted = rank in settings.ranks
        self._path = run.folder.profile / f"rank_{rank:04d}_steps_{self._first + 1}-{self._last}.json.gz"
        self._profiler: Any = None

    def before_step(self, step: Step) -> None:
        """Start or stop the trace if due."""
        if not self._wanted:
            return
        if self._profiler is not None and step.number > self._last:
            self.on_end()
        elif self._profiler is None and self._first < step.number <= self._last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profiler.start()

    def on_end(self) -> None:
        """Write the current trace, complete or not."""
        if self._profiler is None:
            return
        self._wanted = False
        self._profiler.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
        self.run.say(f"wrote profiler trace {self._path}")
