"""The engines a run can train on, chosen by `config.engine`, and what the trainer and checkpoints ask of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from plt_megatron.config.schema import RunConfig
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch
from plt_megatron.train.megatron_engine import MegatronEngine, StepResult, finite_step
from plt_megatron.train.step_times import StepTimes


class Engine(Protocol):
    """The model, its gradients and its optimizer on this rank; `MegatronEngine` says what the methods do."""

    config: RunConfig
    stage: LoopedGPT
    groups: Any
    scheduler: Any
    times: StepTimes
    on_progress: Callable[[], Any]

    def train_step(self, batches: list[MicroBatch], accept: Callable[[float, float], bool] = finite_step) -> StepResult:
        """One optimizer step."""

    def evaluate(self, batches: list[MicroBatch], loop_count: int) -> tuple[float, int]:
        """(sum of token losses, tokens that count)."""

    @property
    def microbatch_losses(self) -> list[tuple[float, int]]:
        """(sum of token losses, tokens that count) of each microbatch run last."""


def build_engine(config: RunConfig, vocab_size: int) -> Engine:
    """The engine that `config.engine` names. Process groups exist; `config` is validated."""
    if config.engine == "megatron":
        return MegatronEngine(config, vocab_size)
    from plt_megatron.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(config, vocab_size)
