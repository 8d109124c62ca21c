"""Optimizer steps and evaluations on DeepSpeed: ZeRO 1, 2, 3 and offload to CPU memory, TP x DP.

Model, data, losses and learning rates are the same as with `MegatronEngine`; ZeRO distributes weights, gradients and
optimizer state over the data-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import _get_param_groups
from torch import Tensor

from plt_megatron.config.rules.deepspeed import deepspeed_config, zero_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.train.deepspeed.runtime import GradientParts, import_deepspeed, join_process_groups, start_deepspeed
from plt_megatron.train.deepspeed.state import DeepSpeedState
from plt_megatron.train.engine import Engine, StepResult, leaves_later_loops_out, masked_loss
from plt_megatron.train.optimizers import LearningRate, check_groups, group_overrides, megatron_settings


class DeepSpeedEngine(Engine):
    """The `Engine` on DeepSpeed. With ZeRO 3 the stage's parameters are empty outside of forward and backward."""

    state: DeepSpeedState

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        deepspeed = import_deepspeed()
        join_process_groups(deepspeed)
        super().__init__(config, vocab_size)
        self.state = DeepSpeedState(self)  # while the parameters are whole
        self._gradient_parts = GradientParts(self.stage, config)
        # megatron-core's, the same as `MegatronEngine`'s.
        groups = _get_param_groups([self.stage], megatron_settings(config), group_overrides(config))
        check_groups(config, self.stage, ((parameter, group) for group in groups for parameter in group["params"]))
        settings = deepspeed_config(config, dist.get_world_size())
        self.deepspeed = start_deepspeed(deepspeed, self.stage, groups, settings)
        self.optimizer = self.deepspeed.optimizer
        self.scheduler = LearningRate(config, self.optimizer)
        if config.training.loop_schedule:
            self.state.allocate()  # a step may update only some parameters, but all are saved
        self._leave_alone = _LeaveAlone(self.optimizer, self.state.later_groups)
        self._verdict = _Verdict(self.optimizer, zero_of(config).zero_stage)

    def _step(self, batches: list[MicroBatch], accept: Callable[[float, float], bool], loop_count: int) -> StepResult:
        self.deepspeed.train()
        self._gradient_parts.expect(loop_count)
        self._leave_alone.begin_step(leaves_later_loops_out(self.config, loop_count))
        # DeepSpeed averages gradients, so each microbatch's loss is divided by the tokens of the step beforehand.
        tokens = int(self._count_tokens(batches))
        with self.times.measure("forward_backward"):
            result = self._mean(self._run(batches, loop_count, tokens))
        with self.times.measure("optimizer"):
            judge = partial(accept, result.loss)
            result.grad_norm, result.updated = self._verdict.step(self.deepspeed, judge)
        self.state.later_step += result.updated and not self._leave_alone.unused
        return result

    def evaluate(self, batches: list[MicroBatch], loop_count: int) -> tuple[float, int]:
        self.deepspeed.eval()
        with torch.no_grad():
            loss_sum, tokens, *_ = self._run(batches, loop_count, None)
            return loss_sum, int(tokens)

    def _run(self, batches: list[MicroBatch], loop_count: int, step_tokens: int | None) -> list[float]:
        """Run each microbatch forward and, if `step_tokens` is given, backward; return `_reduce`'s sums."""
        results = []
        # DeepSpeed averages over data-parallel ranks; we average over tokens.
        gradient = self.stage.loss_gradient = self.groups.dp.size() / (step_tokens or 1)
        for index, batch in enumerate(batches):
            self.on_progress()
            loss_sum, _, result = masked_loss(batch.loss_mask, self.deepspeed(batch, loop_count))
            results.append(result)
            if step_tokens is None:
                continue
            self.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            self.deepspeed.backward(gradient * loss_sum, scale_wrt_gas=False)
            self._gradient_parts.finish_microbatch()
        return self._reduce(results).tolist()


class _LeaveAlone:
    """Skips the optimizer's step for parameter groups that a training step does not use (`later_groups`, by number)."""

    def __init__(self, optimizer: Any, later_groups: set[int]) -> None:
        self._optimizer, self.unused = optimizer, False
        step = optimizer._optimizer_step

        def step_if_used(number: int) -> None:
            if not (self.unused and number in later_groups):
                step(number)

        optimizer._optimizer_step = step_if_used

    def begin_step(self, unused: bool) -> None:
        """Say, before a step's first backward, whether the step leaves these groups unused."""
        self.unused = unused
        kept = getattr(self._optimizer, "grad_partitions_flat_buffer", None)
        if unused and kept is not None:
            kept.zero_()  # stage 3 would use the last step's gradient for parameters that have none in this one


class _Verdict:
    """Lets the caller decide on a step once its gradient norm is known.

    DeepSpeed computes the norm within its step. A norm that is not a number makes it drop the gradients and keep
    weights and optimizer state, so a rejected step gives it such a norm.
    """

    def __init__(self, optimizer: Any, stage: int) -> None:
        self._judge: Callable[[float], bool] | None = None
        self._norm, self._stage = float("nan"), stage
        if stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norms_of_groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._judged(combine_grad_norm_groups(norms_of_groups()))]
        else:
            global_norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *args: self._judged(global_norm(*args))

    def step(self, engine: Any, judge: Callable[[float], bool]) -> tuple[float, bool]:
        """Run DeepSpeed's step and return (gradient norm before clipping, whether the weights were updated)."""
        self._judge, self._norm = judge, float("nan")
        engine.step()
        if self._judge is not None:  # DeepSpeed has seen gradients that are not numbers, and skipped the norm
            updated = self._judge(self._norm)
            assert not updated, "a step whose gradients are not numbers cannot be accepted"
        if engine.optimizer.overflow and self._stage < 3:
            # With an optimizer on the CPU it keeps the dropped gradients and adds the next step's to them.
            engine.optimizer.averaged_gradients.update(dict.fromkeys(engine.optimizer.averaged_gradients))
        return self._norm, not engine.optimizer.overflow

    def _judged(self, norm: Tensor) -> Tensor:
        judge, self._judge = self._judge, None
        assert judge is not None
        value = float(norm)
        if math.isfinite(value) and value >= 0:  # -1 is DeepSpeed's mark for a norm that is not a number
            self._norm = value
        return norm if judge(self._norm) else torch.full_like(norm, -1.0)
