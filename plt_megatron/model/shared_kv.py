"""The first loop's keys and values, shared with later loops (paper section 3.2), and their gradients.

The first loop publishes K and V of each layer as detached leaves. Later loops read the leaves; their gradients
accumulate there, and an identity function in the first loop's graph adds them when its own backward runs. So the loops
are separate autograd graphs connected only by hidden states: the same code serves one process, activation recomputation
and pipelines, where a loop's backward runs long after its forward.

The gradients are exact because a loop's input depends on the previous loop's output: every backward of loop l is over
before the backward of loop l-1 starts, in any schedule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AccumulateSharedKVGrad(torch.autograd.Function):
    """Identity on (K, V); in backward, adds the gradients that later loops left on the published leaves."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, leaves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ctx.leaves = leaves
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        totals = []
        for grad, leaf in zip(grads, ctx.leaves, strict=True):
            totals.append(grad if leaf.grad is None else leaf.grad.add_(grad))
            leaf.grad = None
        return totals[0], totals[1], None


class FirstLoopKV:
    """The first loop's K and V of one microbatch, per layer of this pipeline stage."""

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def publish(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Share K and V of `layer_number` with the later loops.

        When recomputation runs the first loop again, the leaves that later loops have read are kept; only the identity
        is added to the new graph.

        Args:
            layer_number: the layer's number in the whole model.
            key, value: [s, b, num_query_groups / TP, head_dim], after RoPE.

        Returns:
            (key, value) for the rest of the first loop.
        """
        if layer_number not in self._leaves:
            self._leaves[layer_number] = (key.detach().requires_grad_(), value.detach().requires_grad_())
        if not torch.is_grad_enabled():
            return key, value
        return AccumulateSharedKVGrad.apply(key, value, self._leaves[layer_number])

    def read(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """Return K and V of the first loop, as leaves that collect gradients; shapes as in `publish`."""
        return self._leaves[layer_number]
