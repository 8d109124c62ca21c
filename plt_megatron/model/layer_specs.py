"""Layer specs: stock megatron-core layers with PLT's attention, for plain torch and for Transformer Engine.

A mixture of experts has megatron-core's router, dispatchers and experts; only its router knows its loop. Each loop of a
layer routes again and has its own auxiliary losses: a model of L loops has L times as many as a plain one. Their
gradients are the same in every layout: megatron-core multiplies them by the number of tokens in a microbatch, the
engine by the share of the step's tokens that count in the loss, and all gradients are divided by those at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.attention import GatedSlidingWindowAttention, PLTSelfAttention
from plt_megatron.model.loop_context import ExpertStatistics, LoopContext
from plt_megatron.model.norms import AllHeadsRMSNorm, NormColumnParallelLinear, RMSNorm
from plt_megatron.model.te_attention import require_transformer_engine
from plt_megatron.runtime.cpu_runtime import patch_token_dispatcher


class LoopRouter(TopKRouter):
    """megatron-core's router, which also records statistics of its loop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context: LoopContext | None = None  # of the current pass
        self.number = 0

    def set_layer_number(self, layer_number: int) -> None:
        """Store the number that the layer sets. megatron-core's own is left unset: its loss tracker would add up the
        loops."""
        self.number = layer_number

    def gating(self, input: Tensor) -> Tensor:
        """hidden states [s, b, h] -> logits [s, b, experts].

        megatron-core's, except in fp32: where Transformer Engine is installed, it takes that one's product, in TF32.
        """
        return super().gating(input) if self.config.bf16 else torch.nn.functional.linear(input, self.weight)

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


class _OutputNorm:
    """Mixin that adds an RMSNorm to the output of a megatron-core module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.config  # type: ignore[attr-defined]
        norm = kit_of(config.backend).norm
        self.output_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Same signature as megatron-core's; returns (normed output [s (/ TP), b, h], None)."""
        output, bias = super().forward(*args, **kwargs)  # type: ignore[misc]
        assert bias is None
        return self.output_norm(output), None


class OutputNormMLP(_OutputNorm, MLP):
    """megatron-core's MLP with an RMSNorm on its output, before the residual is added (the paper's dense models;
    `norm_placement: post`)."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Same as megatron-core's, which would mistake the norm's copies on all tensor-parallel ranks for rank 0's."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        norm = (self.output_norm, f"{prefix}output_norm.", sharded_offsets, metadata)
        return state | sharded_state_dict_default(*norm, tp_group=self.tp_group)


class OutputNormMoELayer(_OutputNorm, MoELayer):
    """megatron-core's mixture of experts with an RMSNorm on its output, like `OutputNormMLP`."""


class OutputNormSelfAttention(_OutputNorm, PLTSelfAttention):
    """Self-attention with an RMSNorm on its output, before the residual is added (`norm_placement: post`)."""


@dataclass(frozen=True)
class Kit:
    """The modules of a backend's layers."""

    backend: str
    linear: type
    normed_linear: type  # an RMSNorm, then the linear layer
    row_linear: type
    norm: type


def layer_specs(model: ModelConfig, backend: str, layers: range) -> TransformerBlockSubmodules:
    """Return the specs of some of the model's layers, counted from 0. See `layer_spec`."""
    experts = derived.expert_layers(model)
    specs = {kind: layer_spec(model, backend, experts=kind) for kind in {layer in experts for layer in layers}}
    return TransformerBlockSubmodules(layer_specs=[specs[layer in experts] for layer in layers])


def layer_spec(model: ModelConfig, backend: str, *, experts: bool = False) -> ModuleSpec:
    """Return the spec of a PLT layer on `backend` (`torch` or `te`), whose FFN may be a mixture of experts. Raises
    `UserError` for `te` without Transformer Engine, or with too old a version."""
    kit, post = kit_of(backend), model.norm_placement == "post"
    q_norm, k_norm = IdentityOp, IdentityOp
    if model.qk_layernorm:
        heads = model.num_attention_heads, derived.num_query_groups(model)
        q_norm, k_norm = (partial(AllHeadsRMSNorm, num_heads=count) if post else kit.norm for count in heads)
    residual_add = _residual_add(derived.residual_factor(model))
    return ModuleSpec(
        module=MoETransformerLayer if experts else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=OutputNormSelfAttention if post else PLTSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=kit.linear if post else kit.normed_linear,
                    core_attention=GatedSlidingWindowAttention,
                    linear_proj=kit.row_linear,
                    q_layernorm=q_norm,
                    k_layernorm=k_norm,
                ),
            ),
            self_attn_bda=residual_add,
            # A router needs the normed states themselves; an MLP's first linear layer norms its own input.
            pre_mlp_layernorm=kit.norm if experts and not post else IdentityOp,
            mlp=_ffn(model, kit, experts),
            mlp_bda=residual_add,
        ),
    )


def kit_of(backend: str) -> Kit:
    """Return the modules of `backend`."""
    if backend == "torch":
        return Kit(backend, ColumnParallelLinear, NormColumnParallelLinear, RowParallelLinear, RMSNorm)
    require_transformer_engine()
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return Kit(backend, TEColumnParallelLinear, TELayerNormColumnParallelLinear, TERowParallelLinear, TENorm)


def _residual_add(factor: float) -> Callable[..., Any]:
    """Return megatron-core's hook for adding to the residual stream: residual + factor * output."""
    if factor == 1.0:
        return get_bias_dropout_add

    def build(training: bool, fused: bool) -> Callable[..., Tensor]:
        return add

    def add(output_and_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_and_bias
        assert bias is None and dropout == 0.0
        return torch.add(residual, output.to(residual.dtype), alpha=factor)

    return build


def _moe_submodules(kit: Kit) -> MoESubmodules:
    """Return the submodules of an MoE layer: experts that run one after another in torch, a grouped GEMM in Transformer
    Engine; a shared expert is an ordinary MLP."""
    patch_token_dispatcher()
    if kit.backend == "te":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider as Provider
    else:
        from megatron.core.models.backends import LocalSpecProvider as Provider
    shared = MLPSubmodules(linear_fc1=kit.linear, linear_fc2=kit.row_linear)
    return MoESubmodules(
        experts=Provider().grouped_mlp_modules(kit.backend == "te"),
        shared_experts=partial(SharedExpertMLP, submodules=shared),
        router=LoopRouter,
    )


def _ffn(model: ModelConfig, kit: Kit, experts: bool) -> Any:
    post = model.norm_placement == "post"
    output_norm = model.norm_placement != "pre"
    if experts:
        return partial(OutputNormMoELayer if output_norm else MoELayer, submodules=_moe_submodules(kit))
    mlp = MLPSubmodules(linear_fc1=kit.linear if post else kit.normed_linear, linear_fc2=kit.row_linear)
    return partial((OutputNormMLP if output_norm else MLP).as_mlp_submodule, submodules=mlp)
