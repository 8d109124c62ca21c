"""State that a layer needs during a pass: the loop, the first loop's K and V, document boundaries.

It is passed as the `packed_seq_params` argument, which megatron-core hands to `core_attention` on every path, including
activation recomputation. It is not a global, since recomputation and pipelines return to a loop later.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from plt_megatron.model.loop_statistics import LoopStatistics
from plt_megatron.model.shared_kv import FirstLoopKV


def document_lengths(starts: Tensor) -> list[int]:
    """Return the lengths of packed documents in tokens, row after row; they add up to b * s.

    Args:
        starts: bool [b, s], True at each document's first token. On a GPU this blocks the host.
    """
    starts = starts.clone()
    starts[:, 0] = True
    first = torch.nonzero(starts.flatten()).flatten().tolist()
    return [end - start for start, end in zip(first, [*first[1:], starts.numel()], strict=True)]


class Documents:
    """The documents packed into a microbatch's rows: whole rows, even if a rank holds only part of them.

    Args:
        starts: bool [b, s], True at each document's first token.
        lengths: `document_lengths(starts)`, if known, which avoids reading from the device.

    Attributes:
        starts: bool [b, s], True at each document's first token. A row's first token always starts a document.
        segments: int [b, s], the index of a token's document within its row.
        lengths: the documents' lengths in tokens, row after row; they add up to b * s.
    """

    def __init__(self, starts: Tensor, lengths: list[int] | None = None) -> None:
        self.starts = starts.clone()
        self.starts[:, 0] = True
        self.segments = self.starts.cumsum(dim=1)
        self.lengths = document_lengths(starts) if lengths is None else lengths

    @cached_property
    def spans(self) -> list[list[range]]:
        """The token ranges of each row's documents."""
        rows, start = [list[range]()], 0
        for length in self.lengths:
            if start == self.starts.shape[1]:
                rows.append([])
                start = 0
            rows[-1].append(range(start, start + length))
            start += length
        return rows

    @property
    def position_ids(self) -> Tensor:
        """int64 [b, s]: a token's index within its document."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.first_tokens

    @cached_property
    def first_tokens(self) -> Tensor:
        """int32 [b, s]: the index in its row of the first token of each token's document."""
        index = torch.arange(self.starts.shape[1], dtype=torch.int32, device=self.starts.device)
        return torch.where(self.starts, index, 0).cummax(dim=1).values

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [documents + 1]: where each document begins in the concatenated rows."""
        # Computed on the device: copying a list to it would block the host.
        first = torch.nonzero_static(self.starts.flatten(), size=len(self.lengths)).flatten()
        return F.pad(first, (0, 1), value=self.starts.numel()).int()


@dataclass
class LoopContext(PackedSeqParams):
    """One loop's pass over one microbatch.

    Attributes:
        loop: 1 for the first loop.
        loop_count: loops of this pass; in an evaluation or a phase of training it may differ from the model's.
        first_loop_kv: K and V of this microbatch's first loop.
        documents: the packed documents, or None if a row is one text.
        statistics: collects the loops' statistics, or None.
    """

    loop: int = 1
    loop_count: int = 1
    first_loop_kv: FirstLoopKV = field(default_factory=FirstLoopKV)
    documents: Documents | None = None
    statistics: LoopStatistics | None = None

    @property
    def is_last_loop(self) -> bool:
        """Whether this is the last loop, which the head follows."""
        return self.loop == self.loop_count

    def at_loop(self, loop: int) -> LoopContext:
        """Return the same microbatch's context in another loop."""
        return replace(self, loop=loop)
