"""Cross-loop parallelism's shift (paper section 3.1): B^(l) = E + shift(h^(l-1)).

`shift` moves hidden states one token to the right. The first position, and the first token of each packed document,
receive the zero vector. Under sequence and context parallelism a rank holds some of the rows; only the last row of each
of its contiguous runs is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plt_megatron.model.context_parallel import SequenceShard


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
