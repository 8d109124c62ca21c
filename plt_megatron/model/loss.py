"""The loss of a microbatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sum_of_losses(losses: Tensor, loss_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (sum of the losses that count, their number) of one microbatch.

    Args:
        losses: float [b, s], one per token.
        loss_mask: float [b, s], or None if every token counts.
    """
    losses = losses.float()
    if loss_mask is None:
        return losses.sum(), torch.full((), losses.numel(), device=losses.device)
    return (losses * loss_mask).sum(), loss_mask.sum()


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        return carrier

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, torch.ones((), device=gradient.device)  # of a scalar in fp32


def attach_loss(carrier: Tensor, loss: Tensor) -> Tensor:
    """Return `carrier`, whose backward also differentiates the scalar `loss`, as if it were added to the step's loss.

    This way a loss in the middle of a pipeline need not be passed to the schedule.
    """
    return _Attached.apply(carrier, loss)
