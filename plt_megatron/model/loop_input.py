"""What loops >= 2 read: B = embedding_scale * E + s * N(h), h the loop before's output (paper section 3.1).

`model.hidden_norm` and `model.learned_hidden_scale` say what N and s are. The paper's is E + h. Where the scale is an
RMSNorm's weight, B starts with a stated ratio of h to E and keeps it while h grows in training
(`model.hidden_scale_ratio`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.model.norms import rms_norm
from plt_megatron.model.transformer_config import PLTTransformerConfig


class LoopInput(nn.Module):
    """Joins the embeddings and the output of the loop before. `hidden_scale` is a parameter, [1] or [h], where it is
    learned."""

    def __init__(self, config: PLTTransformerConfig) -> None:
        super().__init__()
        plt = config.plt
        self.norm, self.eps = plt.hidden_norm, config.layernorm_epsilon
        self.embedding_scale = plt.embedding_scale
        scale = derived.hidden_scale(plt)
        self.hidden_scale: float | nn.Parameter = scale
        if derived.has_learned_hidden_scale(plt):
            size = config.hidden_size if plt.learned_hidden_scale == "channel" else 1
            device = torch.cuda.current_device()
            self.hidden_scale = nn.Parameter(torch.full((size,), scale, dtype=config.params_dtype, device=device))
            # Each tensor-parallel rank has some of the rows: megatron-core sums the gradients.
            self.hidden_scale.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """embeddings and hidden_states, shifted with cross-loop parallelism, [s, b, h] -> [s, b, h]."""
        if self.norm:
            hidden_states = rms_norm(hidden_states, None, self.eps)
        return _scaled(embeddings, self.embedding_scale) + _scaled(hidden_states, self.hidden_scale)


def _scaled(tensor: Tensor, scale: float | nn.Parameter) -> Tensor:
    return tensor if isinstance(scale, float) and scale == 1.0 else tensor * scale
