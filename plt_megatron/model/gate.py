"""The gate of the gated sliding-window attention: one scalar per head and token (paper section 3.3).

`query` (the paper): g = sigmoid(w_h . Q_h + b_h). `hidden` (LoopCoder-v2): g = sigmoid(w_h . RMSNorm(x) + b_h), with x
the layer's input residual stream and the norm the gate's own. Weights start at zero, so that g = 1/2. With
`model.gate_activation: tanh`, g starts at 0, with gradients, as in Flamingo (arXiv 2204.14198).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from plt_megatron.model.norms import RMSNorm

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}  # by `model.gate_activation`


def _zeros(config: TransformerConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=config.params_dtype, device=torch.cuda.current_device()))


def _zeros_by_head(config: TransformerConfig, *shape: int) -> nn.Parameter:
    """Return a parameter of zeros for this tensor-parallel rank's heads."""
    parameter = _zeros(config, *shape)
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


class QueryGate(nn.Module):
    """Gate logits from each head's query. Weight [heads / TP, head_dim], bias [heads / TP], split by head."""

    reads_hidden_states = False

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        assert config.kv_channels is not None
        heads = config.num_attention_heads // tp_group.size()
        self.weight = _zeros_by_head(config, heads, config.kv_channels)
        self.bias = _zeros_by_head(config, heads)

    def forward(self, query: Tensor) -> Tensor:
        """query [s, b, heads / TP, head_dim], after RoPE -> logits [s, b, heads / TP]."""
        return (query * self.weight).sum(dim=-1) + self.bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Same signature as megatron-core's modules; shards every parameter along its first dimension."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, dict.fromkeys(state, 0), sharded_offsets)


class HiddenGate(nn.Module):
    """Gate logits from the residual stream. Weight [heads, hidden], bias [heads] and norm [hidden] are replicated on
    every rank: each computes all heads for its rows, and only the logits are exchanged."""

    reads_hidden_states = True

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.weight = _zeros(config, config.num_attention_heads, config.hidden_size)
        self.bias = _zeros(config, config.num_attention_heads)
        self.gate_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [s (/ TP), b, hidden] -> logits [s, b, heads / TP]."""
        logits = nn.functional.linear(self.gate_norm(hidden_states), self.weight, self.bias)
        if self.sequence_parallel:
            # Every rank's gradient covers all heads after the scatter's backward, so no reduction is needed here.
            logits = gather_from_sequence_parallel_region(
                logits, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return scatter_to_tensor_model_parallel_region(logits, group=self.tp_group)


# By `model.gate_input`. Gates with `reads_hidden_states` are called with the layer's input in every loop, before the
# core attention; the others with the query, in the core attention of loops >= 2.
GATES = {"query": QueryGate, "hidden": HiddenGate}
