"""Counts where the host would wait for a GPU. These functions run in the pool's workers.

On a CPU nothing waits; what is counted is each place that reads a tensor's values, or whose result has a shape that
depends on them, or that copies a Python number to the device.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plt_megatron.config.schema import RunConfig
from tests.distributed import checkpoint_jobs as jobs

_aten = torch.ops.aten
# `item`, `float`, `int`, `bool` and the like all become the first.
_READS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten._unique2}
_INDEXING = {_aten.index, _aten.index_put_}
# What does not wait in a GPU's run: a torch optimizer's counters, which are on the host, and stand-ins for kernels.
_NO_WAITS = ("torch/optim/", "tests/te/kernels_")


class HostWaits(TorchDispatchMode):
    """Within it, `places` counts them, by file and line."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._patches = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _READS or (packet in _INDEXING and _is_masked(args)):
            self._count()
        return func(*args, **(kwargs or {}))

    def _count(self) -> None:
        frame: Any = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename and "/torch/optim/" not in frame.f_code.co_filename:
            frame = frame.f_back
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if not any(name in place for name in _NO_WAITS):
            self.places[place] += 1

    def __enter__(self) -> HostWaits:
        for owner, name in ((Tensor, "tolist"), (Tensor, "numpy"), (Tensor, "cpu"), (torch.cuda, "synchronize")):
            self._patches.enter_context(self._counted(owner, name, lambda args, kwargs: True))
        for name in ("tensor", "as_tensor"):
            to_device = self._counted(torch, name, lambda args, kwargs: kwargs.get("device") is not None)
            self._patches.enter_context(to_device)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _counted(self, owner: Any, name: str, counts: Any) -> Any:
        stock = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if counts(args, kwargs):
                self._count()
            return stock(*args, **kwargs)

        return mock.patch.object(owner, name, counted)


def _is_masked(args: Any) -> bool:
    """Tell whether a mask chooses the elements; a single value is put to them without knowing how many there are."""
    masked = any(index is not None and index.dtype == torch.bool for index in args[1])
    return masked and (len(args) < 3 or args[2].numel() > 1)


def waits_of_a_step(config: RunConfig, microbatches: int = 2) -> dict[str, int]:
    """The places in the second optimizer step over packed documents, as a run makes its microbatches."""
    engine = jobs.build(config)
    engine.train_step(packed_batches(microbatches))
    batches = packed_batches(microbatches)
    with HostWaits() as waits:
        engine.train_step(batches)
    return dict(waits.places)


def packed_batches(count: int) -> list[Any]:
    """Microbatches of two rows of three documents, made as a run makes them."""
    from plt_megatron.data.datasets import make_sample
    from plt_megatron.train.data import _to_microbatch, collate

    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        text = torch.randint(0, jobs.VOCAB, (jobs.LENGTH + 1,), generator=generator).numpy()
        sample = make_sample(text, [5, 4, len(text) - 9], reset=True)
        made.append(_to_microbatch({**collate([sample, sample]), "sample_ids": torch.tensor([0, 1])}))
    return made
