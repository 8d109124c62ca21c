"""Under a `training.loop_schedule`: the loops of the last step, and the losses of steps with as many."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.engine import StepResult


class LoopLosses(Callback):
    """Means since the last record: the loss of a record alone is one step's, of whatever loops it had."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._losses: defaultdict[int, list[float]] = defaultdict(list)
        self._loop_count = 0

    def after_step(self, step: Step, result: StepResult) -> None:
        """Note the loss."""
        self._loop_count = step.loop_count
        if result.updated:
            self._losses[step.loop_count].append(result.loss)

    def on_log(self) -> dict[str, Any]:
        """`loop_count` of the step, and `loss_by_loops`: mean losses by loop count."""
        if not self.run.config.training.loop_schedule:
            return {}
        means = {str(loops): sum(losses) / len(losses) for loops, losses in sorted(self._losses.items())}
        self._losses.clear()
        return {"loop_count": self._loop_count, "loss_by_loops": means}
