"""The training record of a step, which all callbacks add to."""

from __future__ import annotations

import dataclasses
from typing import Any

from plt_megatron.train.callbacks.base import Callback, Step
from plt_megatron.train.engine import StepResult


class TrainLog(Callback):
    """Every `logging.log_interval` steps and after the last one."""

    def after_step(self, step: Step, result: StepResult) -> None:
        """Report the record if due."""
        if not self.run.is_due(self.run.config.logging.log_interval):
            return
        clock = self.run.clock
        record: dict[str, Any] = {"kind": "train", "step": clock.step, "tokens": clock.tokens}
        record |= {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
        for callback in self.run.callbacks:
            record |= callback.on_log()
        self.run.report(record)
