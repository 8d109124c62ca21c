"""The z-loss of the language-model head (PaLM, arXiv 2204.02311): coefficient * log(Z)^2 of each token, with
Z = sum of exp(logits), which keeps the logits from drifting away together.

log(Z) is the token's cross-entropy plus its label's logit. So any implementation of the cross-entropy, fused or not,
split over tensor-parallel ranks or not, also provides the softmax in backward, and no second pass over the logits is
needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plt_megatron.model.loss import sum_of_losses


class HeadZLoss:
    """Adds the z-loss's gradient to the losses, and accumulates its values.

    Args:
        coefficient: factor of log(Z)^2, which is in nats^2.
        tp_group: ranks that share the vocabulary.
    """

    def __init__(self, coefficient: float, tp_group: dist.ProcessGroup) -> None:
        self.coefficient, self._tp_group = coefficient, tp_group
        self._total: Tensor | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        cross_entropy: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the plain cross-entropies, float32 [b, s], whose gradient is that of cross-entropy plus z-loss.

        Args:
            logits: [s, b, vocab / TP], which `cross_entropy` may overwrite.
            labels: int64 [b, s].
            loss_mask: float [b, s], 1 where a token counts; None: everywhere.
            cross_entropy: (labels, logits) -> [b, s].
        """
        logits, of_labels = _LabelLogits.apply(logits, labels.transpose(0, 1), self._tp_group)
        losses = cross_entropy(labels, logits)
        squares = (losses + of_labels.transpose(0, 1)).square()
        total = sum_of_losses(squares.detach(), loss_mask)[0].double()
        self._total = total if self._total is None else self._total + total
        weighted = self.coefficient * squares
        return losses + (weighted - weighted.detach())

    def take(self) -> Tensor | float:
        """Return the sum of log(Z)^2 over the tokens that counted since the last call, float64 []; 0.0 if none did."""
        total, self._total = self._total, None
        return 0.0 if total is None else total


class _LabelLogits(torch.autograd.Function):
    """logits [s, b, vocab / TP], labels [s, b] -> (the logits, float32 [s, b]: each label's logit).

    The second output's gradient is added to the first's in place: a separate one would be as large as the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        rows = logits.shape[-1]
        own = labels - group.rank() * rows
        elsewhere = (own < 0) | (own >= rows)
        own = own.masked_fill(elsewhere, 0).unsqueeze(-1)
        found = logits.gather(-1, own).squeeze(-1).float().masked_fill(elsewhere, 0.0)
        if group.size() > 1:
            dist.all_reduce(found, group=group)
        ctx.save_for_backward(own, elsewhere)
        ctx.mark_dirty(logits)  # returned itself, not as a view: the cross-entropy may overwrite it
        return logits, found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, of_labels = gradients
        own, elsewhere = ctx.saved_tensors
        added = of_labels.masked_fill(elsewhere, 0.0).to(gradient.dtype).unsqueeze(-1)
        return gradient.scatter_add_(-1, own, added), None, None
