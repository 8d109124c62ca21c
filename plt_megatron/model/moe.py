"""Mixture-of-experts layers: megatron-core's router, dispatchers and experts, with a router that knows its loop.

Each loop of a layer routes again and has its own auxiliary losses: a model of L loops has L times as many as a plain
one. Their gradients are the same in every layout: megatron-core multiplies them by the number of tokens in a
microbatch, and all gradients are divided by the step's number of tokens at the end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from plt_megatron.model.loop_context import LoopContext
from plt_megatron.model.loop_statistics import ExpertStatistics
from plt_megatron.runtime.cpu_runtime import patch_token_dispatcher


class LoopRouter(TopKRouter):
    """megatron-core's router, which also records statistics of its loop.

    Attributes:
        context: the current pass's context, or None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context: LoopContext | None = None
        self.number = 0

    def set_layer_number(self, layer_number: int) -> None:
        """Store the number that the layer sets. megatron-core's own is left unset: its loss tracker would add up the
        loops."""
        self.number = layer_number

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [s, b, experts] -> (weights, whether a token goes to an expert), both [s * b, experts]."""
        weights, kept = super().routing(logits, padding_mask)
        if noted := self._noted():
            statistics, loop = noted
            chosen = kept
            if self.config.moe_expert_capacity_factor is not None:
                best = logits.detach().flatten(0, 1).topk(self.topk, dim=-1).indices
                chosen = torch.zeros_like(kept).scatter(1, best, True)
            statistics.add_routing(loop, self.number, chosen, kept)
        return weights, kept

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count each expert's tokens like megatron-core, but uncompiled: megatron-core compiles this one sum, anew for
        each router and, on a CPU, with a compiler that may not be installed."""
        assert padding_mask is None
        if self.enable_expert_bias and torch.is_grad_enabled():
            self.local_tokens_per_expert += routing_map.sum(dim=0)

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the token counts in fp32 too: megatron-core, which calls this before it uses or saves the bias, leaves
        them in the model's precision. bf16 has 8 bits, so a count would stop at 256."""
        super()._maintain_float32_expert_bias()
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Record the auxiliary loss. Same signature as megatron-core's; called where the loss is differentiated."""
        if noted := self._noted():
            statistics, loop = noted
            statistics.add_loss("aux_loss", loop, aux_loss / aux_loss_coeff)
        return super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff, aux_loss, *args, **kwargs)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Record the z-loss. Same signature as megatron-core's."""
        if self.config.moe_z_loss_coeff is not None and torch.is_grad_enabled() and (noted := self._noted()):
            statistics, loop = noted
            statistics.add_loss("z_loss", loop, z_loss_func(logits.detach(), 1.0))
        return super().apply_z_loss(logits, padding_mask)

    def _noted(self) -> tuple[ExpertStatistics, int] | None:
        """Return the statistics to record this pass in, and its loop, or None if nothing is to be recorded."""
        statistics = None if self.context is None else self.context.statistics
        if self.context is None or statistics is None or statistics.experts is None:
            return None
        return statistics.experts, self.context.loop


class MoETransformerLayer(TransformerLayer):
    """Layer that passes its context to the router at every call, since recomputation runs a loop again later."""

    def _forward_mlp(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        self.mlp.router.context = packed_seq_params
        try:
            return super()._forward_mlp(*args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self.mlp.router.context = None


def moe_submodules(backend: str, linear: type, row_linear: type) -> MoESubmodules:
    """Return the submodules of an MoE layer: experts that run one after another in torch, a grouped GEMM in Transformer
    Engine; a shared expert is an ordinary MLP."""
    patch_token_dispatcher()
    provider: Any
    if backend == "te":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        provider = TESpecProvider()
    else:
        from megatron.core.models.backends import LocalSpecProvider

        provider = LocalSpecProvider()
    return MoESubmodules(
        experts=provider.grouped_mlp_modules(backend == "te"),
        shared_experts=partial(SharedExpertMLP, submodules=MLPSubmodules(linear_fc1=linear, linear_fc2=row_linear)),
        router=LoopRouter,
    )
