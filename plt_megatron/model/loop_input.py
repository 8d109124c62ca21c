"""Input of loops >= 2: B = embedding_scale * E + s * N(h), with h the previous loop's output (paper section 3.1).

`model.loop_norm` and `model.learned_hidden_scale` choose N and s; the paper uses E + h. If the scale is an RMSNorm's
weight, B keeps its ratio of h to E while h grows in training.

With cross-loop parallelism `shift` first moves h one token to the right. The first position, and the first token of
each packed document, receive the zero vector. Under sequence and context parallelism a rank holds some of the rows;
only the last row of each of its contiguous runs is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.model.context_parallel import SequenceShard
from plt_megatron.model.norms import rms_norm
from plt_megatron.model.transformer_config import PLTTransformerConfig


def shift(hidden_states: Tensor, starts: Tensor | None = None, rows: SequenceShard | None = None) -> Tensor:
    """Move hidden states one token to the right.

    Args:
        hidden_states: [s, b, ...], or this rank's rows of it.
        starts: bool [b, s] over the whole sequence, True where the zero vector belongs, besides the first position.
        rows: which rows this rank holds; None: all.

    Returns:
        A tensor of the same shape, equal to the unsharded shift in every layout.
    """
    if rows is None or rows.size == 1:
        shifted = torch.cat((torch.zeros_like(hidden_states[:1]), hidden_states[:-1]))
    else:
        shifted = _shift_runs(hidden_states, rows)
    if starts is None:
        return shifted
    keep = ~starts if rows is None else ~rows.select(starts, 1)
    return shifted * keep.transpose(0, 1)[(..., *[None] * (shifted.dim() - 2))]


def _shift_runs(hidden_states: Tensor, rows: SequenceShard) -> Tensor:
    runs = rows.runs(hidden_states.shape[0] * rows.size)
    parts, first = [], 0
    for run, (before,) in zip(runs, rows.halo(1, hidden_states), strict=True):
        if run.start == 0:
            parts.append(torch.zeros_like(hidden_states[:1]))
        # Used even if empty (nothing precedes the run), so that all ranks take part in the exchange's backward.
        parts += [before, hidden_states[first : first + len(run) - 1]]
        first += len(run)
    return torch.cat(parts)


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
