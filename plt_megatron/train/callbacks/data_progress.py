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
        """Note the size of its batch."""
        self._global_batch_size = step.global_batch_size

    def on_log(self) -> dict[str, Any]:
        """`source_epochs`, and under a `training.batch_schedule` the last step's `global_batch_size`."""
        epochs = {"source_epochs": self.run.data.epochs(self.run.clock.samples)}
        if not self.run.config.training.batch_schedule:
            return epochs
        return epochs | {"global_batch_size": self._global_batch_size}
