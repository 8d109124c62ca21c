"""A run with nvidia-resiliency-ext's own Python, and a stand-in for its binding of CUPTI, which takes a GPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from plt_megatron.config.schema import RunConfig
from tests.distributed.training_jobs import train

NVRX = Path(__file__).resolve().parents[2] / "build/nvrx"  # `make te`


class _Profiler:
    """Times of kernels: of all ranks 1 and 3 microseconds, but at look `i` `slower[i]` times as long on its rank."""

    def __init__(self, rank: int, slower: Sequence[tuple[int, float]]) -> None:
        self._rank, self._slower, self._look, self._timed = rank, slower, 0, 0

    def initialize(self) -> None: ...

    def shutdown(self) -> None: ...

    def start(self) -> None:
        self._timed += 1

    def stop(self) -> None: ...

    def reset(self) -> None:
        self._look, self._timed = self._look + 1, 0

    def get_stats(self) -> dict[str, Any]:
        assert self._timed == 2, "the steps since the last look"
        rank, factor = self._slower[self._look]
        factor = factor if rank == self._rank else 1.0
        times = {"gemm": factor, "attention": 3 * factor, "ncclDevKernel_AllReduce": 100.0 * (1 + self._rank)}
        return {
            name: types.SimpleNamespace(min=time, max=time, median=time, avg=time, stddev=0.0, num_calls=5)
            for name, time in times.items()
        }


def train_with_slow_gpus(config: RunConfig, slower: Sequence[tuple[int, float]]) -> bool | str:
    """Train. `slower`: for each look a rank and how much longer its kernels take."""
    import torch.distributed as dist

    from plt_megatron.train.callbacks import performance

    binding = types.SimpleNamespace(CuptiProfiler=lambda **_: _Profiler(dist.get_rank(), slower))
    with (
        mock.patch.object(sys, "path", [str(NVRX), *sys.path]),
        mock.patch.object(performance, "_has_gpu", lambda: True),
    ):
        sys.modules["nvrx_cupti_module"] = binding  # type: ignore[assignment]
        try:
            return train(config)
        finally:
            made_up = ("nvidia_resiliency_ext", "nvrx_cupti_module")
            for name in [name for name in sys.modules if name.startswith(made_up)]:
                del sys.modules[name]
