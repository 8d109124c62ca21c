"""Batches in a fixed order that a run can leave and resume at any point.

Which samples form the n-th global batch depends on nothing but the dataset and the global batch sizes. Layouts only
divide it differently, and a run is resumed by the number of samples consumed: there is no other state, and no
random number generator. The samples' order is the dataset's, which follows from the seed and the number of samples
asked for: a longer run draws in another order, which `mix.fingerprint` with `num_samples` detects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor


class SampleSource(Protocol):
    """A dataset like `Samples`: samples are dicts of tensors of equal shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples: each value becomes [micro batch, ...]."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def micro_batch_indices(
    length: int,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_sizes: Iterable[int],
    data_parallel_rank: int,
    data_parallel_size: int,
    wrap_to: int | None = None,
) -> Iterator[list[int]]:
    """Yield the sample numbers of this rank's microbatches, one global batch after the other.

    Microbatch j of rank r is samples [(j * ranks + r) * micro batch size, ...) of the global batch. Ends before the
    first global batch that does not fit in `length`; with `wrap_to`, continues with that sample after the last one.

    Args:
        consumed_samples: samples that all ranks together have trained on.
        global_batch_sizes: sizes of the batches that follow; iteration ends with them.

    Raises:
        ValueError: a global batch does not divide into microbatches over the ranks.
    """
    per_step = micro_batch_size * data_parallel_size
    start = consumed_samples
    for size in global_batch_sizes:
        if micro_batch_size < 1 or size < 1 or size % per_step:
            raise ValueError(f"global batch size {size} is not a multiple of {micro_batch_size} x {data_parallel_size}")
        if wrap_to is None and start + size > length:
            return
        for first in range(start + data_parallel_rank * micro_batch_size, start + size, per_step):
            part, to = range(first, first + micro_batch_size), wrap_to or 0
            yield [index if index < length else to + (index - length) % (length - to) for index in part]
        start += size


def batches(dataset: SampleSource, indices: Iterator[list[int]], prefetch: int = 0) -> Generator[dict[str, Tensor]]:
    """Iterate over microbatches, dicts of stacked tensors; `sample_ids` (int64 [micro batch]) has the sample numbers.

    Args:
        indices: sample numbers from `micro_batch_indices`.
        prefetch: microbatches that a thread prepares ahead, in the same order. Close the iterator to end the thread.
    """
    made = ({**collate([dataset[index] for index in part]), "sample_ids": torch.tensor(part)} for part in indices)
    return _ahead(made, prefetch) if prefetch > 0 else made


def _ahead(items: Iterator[dict[str, Tensor]], depth: int) -> Generator[dict[str, Tensor]]:
    """Yield `items`, prepared by a thread up to `depth` ahead; raise the thread's exception in place of an item."""
    pool = ThreadPoolExecutor(1, "batches")
    try:
        ready = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := ready.popleft().result()) is not None:
            ready.append(pool.submit(next, items, None))
            yield item
    finally:
        # A thread still inside torch when the interpreter exits would abort the process.
        pool.shutdown(wait=True, cancel_futures=True)
