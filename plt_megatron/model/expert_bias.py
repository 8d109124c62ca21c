"""Biases that balance the load of experts without a loss (arXiv 2408.15664): one of each layer, whatever its loops.

megatron-core adds up which experts a layer's tokens go to, over loops and microbatches, where gradients are enabled:
not in validation, and in recomputation once. When a step's gradients are reduced, so are the counts, over all ranks
that hold the layer, and each expert's bias moves by `model.moe.router_bias_update_rate` towards an even load. That is
before the step is judged: one that does not update the weights must not move the biases either.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule


class ExpertBiases:
    """A snapshot of a stage's biases. Empty where there are none."""

    @torch.no_grad()
    def __init__(self, stage: MegatronModule) -> None:
        enabled = stage.config.moe_router_enable_expert_bias  # every step asks: spare it the walk over all modules
        modules = stage.modules() if enabled else ()
        biases = [module.expert_bias for module in modules if getattr(module, "expert_bias", None) is not None]
        self._kept = [(bias, bias.clone()) for bias in biases]

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back, in place."""
        for bias, kept in self._kept:
            bias.copy_(kept)
