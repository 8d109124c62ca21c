"""Says before the first step how each kind of parameter is updated."""

from __future__ import annotations

from plt_megatron.train.callbacks.base import Callback
from plt_megatron.train.optimizers import described


class OptimizerSettings(Callback):
    """A line on the optimizer."""

    def on_start(self) -> None:
        """The line."""
        self.run.say(described(self.run.config))
