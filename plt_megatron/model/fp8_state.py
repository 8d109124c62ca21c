"""Delayed-scaling state: each FP8 module's scales and amax histories.

Only a step that updates the weights may change this state. Validation would leave histories that differ between
data-parallel ranks, of which a checkpoint keeps only one; and a step skipped for an infinite value would keep the scale
low for as many calls as the history is long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


def _states(stage: MegatronModule) -> Iterator[tuple[Tensor, Tensor]]:
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


class Fp8State:
    """Snapshot of the FP8 state of a stage's modules; empty without FP8, or for a recipe without history."""

    @torch.no_grad()
    def __init__(self, stage: MegatronModule) -> None:
        self._stage = stage
        self._kept = [(scale, history, scale.clone(), history.clone()) for scale, history in _states(stage)]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state in place: Transformer Engine's buffers refer to these tensors."""
        known = set()
        for scale, history, old_scale, old_history in self._kept:
            scale.copy_(old_scale)
            history.copy_(old_history)
            known.add(id(scale))
        for scale, history in _states(self._stage):
            if id(scale) not in known:  # created after the snapshot
                scale.fill_(1)
                history.zero_()


@contextmanager
def fp8_state_unchanged(stage: MegatronModule) -> Iterator[None]:
    """Restore the FP8 state of the stage's modules when the block ends."""
    state = Fp8State(stage)
    try:
        yield
    finally:
        state.restore()
