"""Loss of the same weights on the same held-out text, at each of the configured loop counts."""

from __future__ import annotations

import contextlib

from plt_megatron.config import derived
from plt_megatron.train.callbacks.base import Callback, Step
from plt_megatron.train.engine import StepResult


class Validation(Callback):
    """Every `validation.interval` steps and after the last one."""

    def after_step(self, step: Step, result: StepResult) -> None:
        """Validate if it is due."""
        settings = self.run.config.validation
        if not self.run.is_due(settings.interval) or settings.iters == 0 or self.run.data.validation is None:
            return
        self.run.beat("validating")
        with self.run.engine.times.measure("validation"):
            for loop_count in derived.validation_loop_counts(self.run.config):
                self._validate(loop_count)

    def _validate(self, loop_count: int) -> None:
        loss_sum, tokens, clock = 0.0, 0, self.run.clock
        with contextlib.closing(self.run.data.validation_batches()) as data:
            for _ in range(self.run.config.validation.iters):
                losses, counted = self.run.engine.evaluate(next(data), loop_count)
                loss_sum, tokens = loss_sum + losses, tokens + counted
        record = {"kind": "validation", "step": clock.step, "tokens": clock.tokens}
        self.run.report({**record, "loop_count": loop_count, "loss": loss_sum / max(tokens, 1)})
