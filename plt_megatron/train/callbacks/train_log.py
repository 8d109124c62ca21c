"""The training record of a step, which all callbacks add to, and the lines printed before the first step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from megatron.core import parallel_state

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.loop_statistics import ExpertStatistics, LoopStatistics
from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.engine import StepResult
from plt_megatron.train.optimizers import described


class Overview(Callback):
    """Prints, before the first step, a table of the data's sources and how each kind of parameter is updated."""

    def on_start(self) -> None:
        self.run.say(self.run.data.describe())
        self.run.say(described(self.run.config))


class LoopLosses(Callback):
    """Reports, under a `training.loop_schedule`, the last step's loop count and the losses by loop count.

    The losses are means since the last record: a record's own loss is that of one step, whatever its loop count.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._losses: defaultdict[int, list[float]] = defaultdict(list)
        self._loop_count = 0

    def after_step(self, step: Step, result: StepResult) -> None:
        """Record the step's loss under its loop count."""
        self._loop_count = step.loop_count
        if result.updated:
            self._losses[step.loop_count].append(result.loss)

    def on_log(self) -> dict[str, Any]:
        """Return `loop_count` of the step, and `loss_by_loops`: mean losses by loop count."""
        means = {str(loops): sum(losses) / len(losses) for loops, losses in sorted(self._losses.items())}
        self._losses.clear()
        return {"loop_count": self._loop_count, "loss_by_loops": means}


class LoopMeasures(Callback):
    """Collects `LoopStatistics` of the first microbatch in steps that will be logged."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._statistics: LoopStatistics | None = None

    def before_step(self, step: Step) -> None:
        """Give the first microbatch of a step that will be logged an object to collect in."""
        self._statistics = None
        if self.run.is_due(self.run.config.logging.log_interval, step.number):
            self._statistics = step.batches[0].statistics = _empty(self.run.config.model, step.loop_count)

    def on_log(self) -> dict[str, Any]:
        """Return gate means, norms and step sizes, one entry per loop."""
        return {} if self._statistics is None else self._statistics.reduce()


def _empty(model: ModelConfig, loop_count: int) -> LoopStatistics:
    layers, device = model.num_layers, torch.cuda.current_device()
    if model.moe is None:
        return LoopStatistics(loop_count, layers, device)
    parts = parallel_state.get_tensor_and_context_parallel_world_size()
    experts = ExpertStatistics(loop_count, layers, model.moe.num_experts, device, parts)
    return LoopStatistics(loop_count, layers, device, experts)


class TrainLog(Callback):
    """Reports the record every `logging.log_interval` steps and after the last one: the step's results, the passes over
    the data's sources, batch size and row length where a schedule changes them, and what other callbacks add."""

    def after_step(self, step: Step, result: StepResult) -> None:
        if not self.run.is_due(self.run.config.logging.log_interval):
            return
        config, clock = self.run.config, self.run.clock
        record: dict[str, Any] = {"kind": "train", "step": clock.step, "tokens": clock.tokens}
        record |= {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
        record["source_epochs"] = self.run.data.epochs(clock.samples)
        if config.training.batch_schedule:
            record["global_batch_size"] = step.global_batch_size
        if config.data.length_schedule:
            record["sequence_length"] = step.sequence_length
        for callback in self.run.callbacks:
            record |= callback.on_log()
        self.run.report(record)
