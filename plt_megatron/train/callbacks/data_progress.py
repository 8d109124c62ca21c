"""Reports the data mix before the first step, and passes over its sources in every record."""

from __future__ import annotations

from typing import Any

from plt_megatron.train.callbacks.base import Callback


class DataProgress(Callback):
    """Reports on the data."""

    def on_start(self) -> None:
        """A table of the sources."""
        self.run.say(self.run.data.describe())

    def on_log(self) -> dict[str, Any]:
        """`source_epochs`."""
        return {"source_epochs": self.run.data.epochs(self.run.clock.samples)}
