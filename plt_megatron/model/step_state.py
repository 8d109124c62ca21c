"""State that a forward pass changes: FP8 modules' scales and amax histories (delayed scaling), and experts' biases.

Only a step that updates the weights may change it. Validation would leave histories that differ between data-parallel
ranks, of which a checkpoint keeps only one; and a step skipped for an infinite value would keep the scale low for as
many calls as the history is long.

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

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


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
