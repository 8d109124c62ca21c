"""The loss of a microbatch."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_of_losses(losses: Tensor, loss_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of the losses that count, their number) of one microbatch.

    Args:
        losses: float [b, s], of each token.
        loss_mask: float [b, s], or None where every token counts.
    """
    losses = losses.float()
    if loss_mask is None:
        return losses.sum(), torch.full((), losses.numel(), device=losses.device)
    return (losses * loss_mask).sum(), loss_mask.sum()
