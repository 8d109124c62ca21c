"""Statistics of the loops in a logged step: `LoopStatistics` of its first microbatch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.expert_statistics import ExpertStatistics
from plt_megatron.model.loop_statistics import LoopStatistics
from plt_megatron.train.callbacks.base import Callback, Run, Step


class LoopMeasures(Callback):
    """Collects them in steps that will be logged."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._statistics: LoopStatistics | None = None

    def before_step(self, step: Step) -> None:
        """Give the first microbatch an object to collect in."""
        self._statistics = None
        if self.run.is_due(self.run.config.logging.log_interval, step.number):
            self._statistics = step.batches[0].statistics = _empty(self.run.config.model, step.loop_count)

    def on_log(self) -> dict[str, Any]:
        """Gate means, norms and step sizes, one entry per loop."""
        return {} if self._statistics is None else self._statistics.reduce()


def _empty(model: ModelConfig, loop_count: int) -> LoopStatistics:
    layers, device = model.num_layers, torch.cuda.current_device()
    if model.moe is None:
        return LoopStatistics(loop_count, layers, device)
    parts = parallel_state.get_tensor_and_context_parallel_world_size()
    experts = ExpertStatistics(loop_count, layers, model.moe.num_experts, device, parts)
    return LoopStatistics(loop_count, layers, device, experts)
