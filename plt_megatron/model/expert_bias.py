"""Expert biases that balance load without an auxiliary loss (arXiv 2408.15664); all loops of a layer share them.

megatron-core counts the tokens that each expert of a layer gets, over loops and microbatches, wherever gradients are
enabled: not in validation, and only once under recomputation. When a step's gradients are reduced, so are the counts,
over all ranks that hold the layer, and each expert's bias moves by `model.moe.router_bias_update_rate` towards an even
load. This happens before the step is accepted or skipped, so a snapshot undoes it: a step that does not update the
weights must not move the biases either.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule


class ExpertBiases:
    """Snapshot of a stage's expert biases; empty if it has none."""

    @torch.no_grad()
    def __init__(self, stage: MegatronModule) -> None:
        enabled = stage.config.moe_router_enable_expert_bias  # runs every step: skip the walk over all modules
        modules = stage.modules() if enabled else ()
        biases = [module.expert_bias for module in modules if getattr(module, "expert_bias", None) is not None]
        self._kept = [(bias, bias.clone()) for bias in biases]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the biases in place."""
        for bias, kept in self._kept:
            bias.copy_(kept)
