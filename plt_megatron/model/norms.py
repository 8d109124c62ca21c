"""RMSNorm for the torch backend, alone and in front of a column-parallel linear layer.

megatron-core's own torch norm refuses sequence parallelism; this one marks its weight, so that megatron-core sums the
weight's gradient over the tensor-parallel ranks. Parameter names are Transformer Engine's, so weights move between the
two backends without renaming.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def rms_norm(hidden_states: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype; computed in fp32 or wider."""
    if hidden_states.dtype in (torch.float32, torch.float64):
        return torch.rms_norm(hidden_states, (hidden_states.shape[-1],), weight, eps)
    wide = hidden_states.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed = (wide * scale).to(hidden_states.dtype)
    return normed if weight is None else normed * weight


def norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    """Create a norm's weight: ones, marked for megatron-core's gradient reduction over sequence-parallel ranks."""
    weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device()))
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = norm_weight(config, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return rms_norm(hidden_states, self.weight, self.eps)


class AllHeadsRMSNorm(nn.Module):
    """One root-mean-square norm over the channels of all heads (OLMo-2's Q and K norm), with the heads split over the
    tensor-parallel ranks; if there are fewer key heads than ranks, several ranks hold the same one. The weight
    [num_heads * head_dim] is replicated on every rank: megatron-core recognizes Q's and K's norms by their names and
    sums their gradients over the ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int) -> None:
        super().__init__()
        self.eps = eps
        self.weight = norm_weight(config, num_heads * hidden_size)

    def forward(self, heads: Tensor) -> Tensor:
        """[s, b, heads / TP (1 if there are fewer heads than ranks), head_dim] -> the same shape and dtype."""
        group = parallel_state.get_tensor_model_parallel_group()
        flat = heads.flatten(2).float()
        parts = self.weight.numel() // flat.shape[-1]
        holders = group.size() // parts  # ranks with the same heads
        squares = flat.square().sum(dim=-1, keepdim=True)
        if group.size() > 1:
            # All-reduced in forward, and its gradient in backward: every rank's output depends on every rank's heads.
            squares = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(squares / holders, group=group), group=group
            )
        scale = torch.rsqrt(squares / self.weight.numel() + self.eps)
        own = self.weight.chunk(parts)[group.rank() // holders]
        return ((flat * scale).to(heads.dtype) * own).view(heads.shape)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then a column-parallel linear layer, like Transformer Engine's TELayerNormColumnParallelLinear.

    It is one module, so that self-attention sees the residual stream itself (the `hidden` gate reads it).
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = norm_weight(config, input_size)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s (/ TP), b, input_size] -> ([s, b, output_size / TP], bias or None)."""
        return super().forward(rms_norm(input_, self.layer_norm_weight, self.eps), *args, **kwargs)
