"""Loops as virtual pipeline stages: loop l of a stage is model chunk l of megatron-core's interleaved schedule.

All chunks of a rank share the stage's weights; a chunk is a view that knows its loop. The last stage's output of loop l
arrives at the first stage as the input of loop l+1, exactly as in cross-loop parallelism. The bubble shrinks to
(P - 1) / (L * M) of the work, without extra memory for weights.

A forward pass also changes state: FP8 modules' scales and amax histories (delayed scaling), and experts' biases. Only a
step that updates the weights may change it. Validation would leave histories that differ between data-parallel ranks,
of which a checkpoint keeps only one; and a step skipped for an infinite value would keep the scale low for as many
calls as the history is long.

Biases balance the experts' load without an auxiliary loss (arXiv 2408.15664); all loops of a layer share them.
megatron-core counts the tokens that each expert of a layer gets, over loops and microbatches, wherever gradients are
enabled: not in validation, and only once under recomputation. When a step's gradients are reduced, so are the counts,
over all ranks that hold the layer, and each expert's bias moves by `model.moe.router_bias_update_rate` towards an even
load. This happens before the step is accepted or skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from plt_megatron.model.loop_context import LoopContext
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch


class MicroBatches:
    """The microbatches of one step on this rank, with the context that joins each one's loops.

    The chunks request them by index, each in its own order.
    """

    def __init__(self, batches: list[MicroBatch]) -> None:
        self.batches = batches
        self._contexts: list[LoopContext | None] = [None] * len(batches)

    def context(self, index: int, loop: int, loop_count: int) -> LoopContext:
        """Return the context of microbatch `index` in `loop`. It is dropped here after the last loop, so that autograd
        alone decides how long K and V live."""
        context = (self._contexts[index] or self.batches[index].context(loop_count)).at_loop(loop)
        self._contexts[index] = None if context.is_last_loop else context
        return context


class LoopChunk(nn.Module):
    """One loop of a stage, as the schedule's model chunk. Owns no parameters.

    Args:
        config: the schedule's configuration (virtual pipeline size = loops).
        loop: 1 for the first; None runs all loops at once (a model in one stage).
    """

    def __init__(self, stage: LoopedGPT, config: Any, loop: int | None, loop_count: int) -> None:
        super().__init__()
        self._stage = (stage,)  # in a tuple, so that it is not a submodule: a chunk is a view
        self.config = config
        self.loop = loop
        self.loop_count = loop_count
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = None if loop is None or loop_count == 1 else loop - 1
        self.input_tensor: Tensor | None = None
        self._next = 0

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the previous stage's output; called by the schedule before each forward."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.input_tensor = input_tensor

    def rewind(self) -> None:
        """Restart with the first microbatch."""
        self._next = 0

    def forward(self, batches: MicroBatches) -> tuple[Tensor, MicroBatch]:
        """Run this loop over the next microbatch and return (hidden states or losses, the microbatch)."""
        index, self._next = self._next, self._next + 1
        batch = batches.batches[index]
        if self.loop is None:
            return self._stage[0](batch, self.loop_count), batch
        context = batches.context(index, self.loop, self.loop_count)
        return self._stage[0].run_loop(batch, context, self.input_tensor), batch


def build_chunks(stage: LoopedGPT, config: Any, loop_count: int) -> list[LoopChunk]:
    """Return the schedule's model chunks: one per loop in a pipeline, one for all loops in a single stage."""
    if stage.pre_process and stage.post_process:
        return [LoopChunk(stage, config, None, loop_count)]
    return [LoopChunk(stage, config, loop, loop_count) for loop in range(1, loop_count + 1)]


def _scales(stage: MegatronModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (scales, history) of each module and direction that has run in FP8 with delayed scaling."""
    if stage.config.fp8 is None:  # runs every step: skip the walk over all modules
        return
    for module in stage.modules():
        meta = getattr(module, "fp8_meta", None) or {}
        for key in ("scaling_fwd", "scaling_bwd"):
            if hasattr(meta.get(key), "amax_history"):
                yield meta[key].scale, meta[key].amax_history


def renew_weight_copies(stage: MegatronModule) -> None:
    """Make each layer's next call quantize its weights and all later calls of the step use that copy; call this at the
    start of a step.

    Transformer Engine assumes that the call flagged as a step's first microbatch is also the first to be
    differentiated: with fused accumulation its gradient overwrites the buffer. In a looped layer it is the last one, so
    the gradients of all other loops would be lost. So no call is flagged, and the copies are dropped instead: a layer
    without one makes one. With full recomputation the flagged call is not the one that is differentiated, and the
    copies are renewed in place.
    """
    config = stage.config
    if config.recompute_granularity == "full" or not config.gradient_accumulation_fusion:
        stage.set_is_first_microbatch()
        return
    for module in stage.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = False
            module._fp8_workspaces.clear()


def _biases(stage: MegatronModule) -> list[Tensor]:
    if not stage.config.moe_router_enable_expert_bias:  # runs every step, too
        return []
    biases = (getattr(module, "expert_bias", None) for module in stage.modules())
    return [bias for bias in biases if bias is not None]


class StepState:
    """Snapshot of such state of a stage's modules; empty without biases and without FP8, or for a recipe without
    history."""

    @torch.no_grad()
    def __init__(self, stage: MegatronModule) -> None:
        self._stage = stage
        tensors = [*chain.from_iterable(_scales(stage)), *_biases(stage)]
        self._kept = {tensor: tensor.clone() for tensor in tensors}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state in place: Transformer Engine's buffers refer to these tensors."""
        for tensor, kept in self._kept.items():
            tensor.copy_(kept)
        for scale, history in _scales(self._stage):
            if scale not in self._kept:  # created after the snapshot
                scale.fill_(1)
                history.zero_()


@contextmanager
def step_state_unchanged(stage: MegatronModule) -> Iterator[None]:
    """Restore the state of the stage's modules when the block ends."""
    state = StepState(stage)
    try:
        yield
    finally:
        state.restore()
