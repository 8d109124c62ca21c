"""Cross-loop parallelism's shift (paper section 3.1): B^(l) = E + shift(h^(l-1)).

`shift` moves hidden states one token to the right. The first position, and the first token of each packed document,
receive the zero vector. Under sequence parallelism a rank holds a slice of the rows; only the slices' last rows travel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _PreviousRankRow(torch.autograd.Function):
    """The last row of the previous rank's slice (zeros on the first rank); gradients go back to where it came from."""

    @staticmethod
    def forward(ctx: Any, last_row: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        rank = group.rank()
        rows = _all_gather(last_row, group)
        return rows[rank - 1 : rank] if rank > 0 else torch.zeros_like(last_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        rank = group.rank()
        rows = _all_gather(grads[0], group)
        return (rows[rank + 1 : rank + 2] if rank + 1 < group.size() else torch.zeros_like(grads[0])), None


def _all_gather(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[1, b, h] of each rank -> [ranks, b, h]."""
    gathered = torch.empty((group.size(), *row.shape[1:]), dtype=row.dtype, device=row.device)
    dist.all_gather_into_tensor(gathered, row.contiguous(), group=group)
    return gathered


def shift(
    hidden_states: Tensor, starts: Tensor | None = None, sequence_parallel_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Move hidden states one token to the right.

    Args:
        hidden_states: [s, b, h], or this rank's rows [s / TP, b, h] under sequence parallelism.
        starts: bool [b, s] over the whole sequence, True where the zero vector belongs besides the first position.
        sequence_parallel_group: the tensor-parallel group when the rows are split over it.

    Returns:
        A tensor of the same shape; equal to the unsharded shift whatever the layout.
    """
    if sequence_parallel_group is not None and sequence_parallel_group.size() > 1:
        first = _PreviousRankRow.apply(hidden_states[-1:], sequence_parallel_group)
    else:
        first = torch.zeros_like(hidden_states[:1])
    shifted = torch.cat((first, hidden_states[:-1]))
    if starts is None:
        return shifted
    keep = ~starts.transpose(0, 1).unsqueeze(-1)
    if keep.shape[0] != shifted.shape[0]:
        assert sequence_parallel_group is not None
        rows = shifted.shape[0]
        keep = keep[sequence_parallel_group.rank() * rows :][:rows]
    return shifted * keep
