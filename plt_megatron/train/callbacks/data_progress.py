"""Reports the data mix before the first step, and passes over its sources in every record."""

from __future__ import annotations

from typing import Any

from plt_megatron.train.callbacks.base import Callback, Step
from plt_megatron.train.engine import StepResult


class DataProgress(Callback):
    """Reports on the data."""

    def on_start(self) -> None:
        """A table of the sources."""
        self.run.say(self.run.data.describe())

    def after_step(self, step: Step, result: StepResult) -> None:
        """Note its batch and its rows."""
        self._step = step

    def on_log(self) -> dict[str, Any]:
        """`source_epochs`, and of the last step what a `training.batch_schedule` or `data.length_schedule` changes:
        `global_batch_size`, `sequence_length`."""
        config = self.run.config
        found: dict[str, Any] = {"source_epochs": self.run.data.epochs(self.run.clock.samples)}
        if config.training.batch_schedule:
            found["global_batch_size"] = self._step.global_batch_size
        if config.data.length_schedule:
            found["sequence_length"] = self._step.sequence_length
        return found
