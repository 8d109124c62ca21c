"""The cross-loop shift over slices of the rows equals the shift of the whole, gradients included."""

from __future__ import annotations

import numpy as np
import pytest


def shift_slices(rows: int, documents: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(shifted slices put together, the whole shifted, gradient of the slices put together, of the whole)."""
    import torch
    import torch.distributed as dist

    from plt_megatron.model.context_parallel import SequenceShard
    from plt_megatron.model.shift import shift

    generator = torch.Generator().manual_seed(0)
    whole, weights = torch.randn(2, rows, 3, 5, generator=generator)
    starts = torch.rand(3, rows, generator=generator) < 0.3 if documents else None
    if starts is not None:
        starts[0, :: rows // dist.get_world_size()] = True  # a document begins where a slice does
    own = slice(dist.get_rank() * rows // dist.get_world_size(), (dist.get_rank() + 1) * rows // dist.get_world_size())

    part = whole[own].clone().requires_grad_()
    shifted = shift(part, starts, SequenceShard(dist.group.WORLD, sequence_ranks=dist.get_world_size()))
    (shifted * weights[own]).sum().backward()
    whole.requires_grad_()
    expected = shift(whole, starts)
    (expected * weights).sum().backward()
    together = []
    for tensor in (shifted.detach(), part.grad):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        together.append(torch.cat(parts).numpy())
    return together[0], expected.detach().numpy(), together[1], whole.grad.numpy()


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(("ranks", "rows"), [(1, 4), (2, 2), (2, 8), (4, 8), (4, 4)])
def test_slices_shift_as_the_whole(run_distributed, ranks, rows, documents):
    for shifted, expected, gradient, expected_gradient in run_distributed(
        shift_slices, ranks, rows, documents, all_ranks=True
    ):
        assert np.array_equal(shifted, expected)
        assert np.array_equal(gradient, expected_gradient)
