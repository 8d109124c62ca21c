"""Input of loops >= 2: B = embedding_scale * E + s * N(h), with h the previous loop's output (paper section 3.1).

`model.loop_norm` and `model.learned_hidden_scale` choose N and s; the paper uses E + h. If the scale is an RMSNorm's
weight, B keeps its ratio of h to E while h grows in training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.model.norms import rms_norm
from plt_megatron.model.transformer_config import PLTTransformerConfig


class LoopInput(nn.Module):
    """Combination of the embeddings and the previous loop's output. If learned, `hidden_scale` is a parameter, [1] or
    [h]."""

    def __init__(self, config: PLTTransformerConfig) -> None:
        super().__init__()
        plt = config.plt
        self.norm, self.eps = plt.loop_norm == "rms", config.layernorm_epsilon
        self.embedding_scale = plt.embedding_scale
        scale = plt.hidden_scale
        self.hidden_scale: float | nn.Parameter = scale
        if derived.has_learned_hidden_scale(plt):
            size = config.hidden_size if plt.learned_hidden_scale == "channel" else 1
            device = torch.cuda.current_device()
            self.hidden_scale = nn.Parameter(torch.full((size,), scale, dtype=config.params_dtype, device=device))
            # With sequence parallelism each rank has some of the rows: megatron-core sums the gradients.
            self.hidden_scale.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """embeddings and hidden_states (already shifted under cross-loop parallelism), [s, b, h] -> [s, b, h]."""
        if self.norm:
            hidden_states = rms_norm(hidden_states, None, self.eps)
        return _scaled(embeddings, self.embedding_scale) + _scaled(hidden_states, self.hidden_scale)


def _scaled(tensor: Tensor, scale: float | nn.Parameter) -> Tensor:
    return tensor if isinstance(scale, float) and scale == 1.0 else tensor * scale
