"""Context parallelism: a sequence's rows sharded over ranks in megatron-core's zigzag order.

A sequence is cut into 2 * cp chunks, and rank r holds chunks r and 2 * cp - 1 - r, which balances the work of causal
attention. Sequence parallelism divides a rank's rows further, in one piece per tensor-parallel rank. This module
fetches other ranks' rows: all of K and V for global attention, the few rows right before a rank's own for the window
and the cross-loop shift, or all rows of some of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    all_to_all_hp2sp,
    all_to_all_sp2hp,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


def zigzag_runs(length: int, context_ranks: int, sequence_ranks: int, rank: int) -> list[range]:
    """Return the rows of a sequence of `length` that a rank holds, in its order, as one or two contiguous runs.

    Args:
        context_ranks: context-parallel size; 1: none.
        sequence_ranks: tensor-parallel ranks that share a context-parallel rank's rows (sequence parallelism), else 1.
        rank: context-parallel rank * sequence_ranks + tensor-parallel rank, as in megatron-core's groups.
    """
    context_rank, part = divmod(rank, sequence_ranks)
    if context_ranks == 1:
        held = [range(length)]
    else:
        size = length // (2 * context_ranks)
        held = [range(chunk * size, (chunk + 1) * size) for chunk in _held_chunks(context_rank, context_ranks)]
    rows = length // (context_ranks * sequence_ranks)
    first, runs = part * rows, list[range]()
    for run in held:
        own = run[max(first, 0) : max(first + rows, 0)]
        first -= len(run)
        if runs and own and runs[-1].stop == own.start:  # the last rank's chunks are adjacent
            runs[-1] = range(runs[-1].start, own.stop)
        elif own:
            runs.append(own)
    return runs


def _held_chunks(rank: int, ranks: int) -> tuple[int, int]:
    """Return the two of a sequence's 2 * ranks chunks that a rank holds."""
    return rank, 2 * ranks - 1 - rank


def _chunk_holders(ranks: int) -> list[tuple[int, int]]:
    """Return, for each chunk of a sequence, the rank that holds it and whether it is that rank's first or second."""
    return [(rank, 0) for rank in range(ranks)] + [(rank, 1) for rank in reversed(range(ranks))]


@dataclass(frozen=True)
class _Plan:
    """Plan for exchanging the rows before each rank's runs.

    Attributes:
        send: int64 [rows sent], this rank's rows to send, ordered by receiving rank.
        send_counts, receive_counts: rows sent to and received from each rank.
        sizes: rows received for each of this rank's runs.
        order: int64, positions of the wanted rows among those received; None: they arrive in order.
    """

    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    sizes: list[int]
    order: Tensor | None


class SequenceShard:
    """This rank's share of each sequence's rows, with access to other ranks' rows.

    Args:
        group: the ranks that share the rows, tensor-parallel ranks innermost; None: this rank holds all rows.
        context_ranks, sequence_ranks: see `zigzag_runs`; their product is the group's size.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, context_ranks: int = 1, sequence_ranks: int = 1) -> None:
        self.group = group
        self.context_ranks = context_ranks
        self.sequence_ranks = sequence_ranks
        self.size = context_ranks * sequence_ranks
        self.rank = 0 if group is None else group.rank()
        assert self.size == (1 if group is None else group.size())
        self._plans: dict[tuple[int, int, torch.device], _Plan] = {}

    @classmethod
    def of(cls, groups: Any, sequence_parallel: bool) -> SequenceShard:
        """Return the sharding of hidden states under megatron-core's process groups."""
        context, tensor = groups.cp.size(), groups.tp.size() if sequence_parallel else 1
        if context * tensor == 1:
            return cls()
        if tensor == 1:
            return cls(groups.cp, context)
        return cls(groups.tp if context == 1 else groups.tp_cp, context, tensor)

    def runs(self, length: int) -> list[range]:
        """Return this rank's rows of a sequence of `length`."""
        return zigzag_runs(length, self.context_ranks, self.sequence_ranks, self.rank)

    def select(self, whole: Tensor, dim: int) -> Tensor:
        """Return this rank's rows of a tensor that holds all rows in dimension `dim`."""
        if self.size == 1:
            return whole
        parts = [whole.narrow(dim, run.start, len(run)) for run in self.runs(whole.shape[dim])]
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]

    def gather(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Gather all ranks' rows in the sequence's order, and sum gradients over the ranks. Context parallelism only.

        Args:
            own: tensors of one shape [s / CP, ...], this rank's rows.

        Returns:
            Tensors [s, ...].
        """
        assert self.sequence_ranks == 1
        if self.size == 1:
            return own
        count, (rows, *rest) = len(own), own[0].shape
        # One collective for all tensors: each rank's tensors, each in two chunks.
        gathered = gather_from_sequence_parallel_region(torch.stack(own), group=self.group)
        chunks = gathered.view(self.size * count * 2, rows // 2, *rest).unbind()
        order = [
            [2 * (rank * count + number) + half for rank, half in _chunk_holders(self.size)] for number in range(count)
        ]
        return tuple(torch.cat([chunks[index] for index in indices]) for indices in order)

    def to_heads(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Exchange this rank's rows of all heads for all rows of its share of the heads. Context parallelism only.

        Args:
            own: tensors [s / CP, b, heads, d], each with a number of heads divisible by the number of ranks.

        Returns:
            Tensors [s, b, heads / CP, d], rows in the sequence's order.
        """
        assert self.sequence_ranks == 1
        rows, batch, _, channels = own[0].shape
        parts = [tensor.reshape(rows * batch, self.size, -1) for tensor in own]  # a rank's heads are contiguous
        widths = [part.shape[2] for part in parts]
        received = all_to_all_sp2hp(torch.cat(parts, dim=2).flatten(1), self.group)
        chunks = received.view(self.size, 2, rows // 2, batch, -1)
        whole = torch.cat([chunks[holder] for holder in _chunk_holders(self.size)])
        return tuple(part.unflatten(-1, (-1, channels)) for part in whole.split(widths, dim=-1))

    def from_heads(self, whole: Tensor) -> Tensor:
        """Invert `to_heads`: [s, b, heads / CP, d] -> [s / CP, b, heads, d]."""
        length, batch, _, channels = whole.shape
        chunks = whole.reshape(2 * self.size, length // (2 * self.size), batch, -1)
        held = [chunks[chunk] for rank in range(self.size) for chunk in _held_chunks(rank, self.size)]
        received = all_to_all_hp2sp(torch.stack(held).flatten(0, 2), self.group)
        return received.view(length // self.size, batch, -1, channels)

    def halo(self, count: int, *own: Tensor) -> list[tuple[Tensor, ...]]:
        """Fetch the rows right before each of this rank's runs; only these are sent, and their gradients sent back.

        Args:
            count: rows wanted; fewer at the start of the sequence.
            own: tensors [own rows, ...] of one dtype, this rank's rows in its order.

        Returns:
            For each run, the `min(count, run.start)` rows before it of each tensor.
        """
        if self.size == 1 or count == 0:
            return [tuple(tensor[:0] for tensor in own) for _ in self.runs(own[0].shape[0] * self.size)]
        plan = self._plan(own[0].shape[0] * self.size, count, own[0].device)
        sent = torch.cat([tensor.index_select(0, plan.send).flatten(1) for tensor in own], dim=1)
        received = all_to_all(self.group, sent, plan.receive_counts, plan.send_counts)
        if plan.order is not None:
            received = received.index_select(0, plan.order)
        widths = [tensor.shape[1:].numel() for tensor in own]
        parts = zip(received.split(widths, dim=1), own, strict=True)
        rows = (part.reshape(-1, *tensor.shape[1:]).split(plan.sizes) for part, tensor in parts)
        return list(zip(*rows, strict=True))

    def _plan(self, length: int, count: int, device: torch.device) -> _Plan:
        key = (length, count, device)
        if key not in self._plans:
            self._plans[key] = self._make_plan(*key)
        return self._plans[key]

    def _make_plan(self, length: int, count: int, device: torch.device) -> _Plan:
        runs = [zigzag_runs(length, self.context_ranks, self.sequence_ranks, rank) for rank in range(self.size)]
        wanted = [[range(max(0, run.start - count), run.start) for run in held] for held in runs]
        place = np.argsort(np.concatenate([_rows(held) for held in runs]))  # of each row, rank after rank
        owners, local = zip(*(np.divmod(place[_rows(parts)], length // self.size) for parts in wanted), strict=True)
        send = [rows[of == self.rank] for of, rows in zip(owners, local, strict=True)]
        own = owners[self.rank]
        order = np.argsort(np.argsort(own, kind="stable"))  # arrivals are by sender, each sender's in the wanted order
        return _Plan(
            send=torch.tensor(np.concatenate(send), device=device),
            send_counts=[len(rows) for rows in send],
            receive_counts=np.bincount(own, minlength=self.size).tolist(),
            sizes=[len(part) for part in wanted[self.rank]],
            order=None if (order[1:] > order[:-1]).all() else torch.tensor(order, device=device),
        )


def _rows(parts: list[range]) -> np.ndarray:
    return np.concatenate([np.arange(part.start, part.stop) for part in parts])
