"""Slow GPUs are named by nvidia-resiliency-ext's own Python, over a stand-in for its binding of CUPTI, which takes a
GPU: the kernels' times are made up."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from plt_megatron.config.schema import RunConfig
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm.status import _step_line
from tests.distributed.pool import DistributedFailure
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import folder

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


@pytest.fixture
def config(data, tmp_path) -> RunConfig:
    return run_config(
        "watched",
        tmp_path,
        data,
        training={"on_nonfinite": "skip"},
        validation={"iters": 0},
        checkpoint={"enabled": False},
        logging={"straggler.interval": 2},
    )


@pytest.mark.skipif(not NVRX.is_dir(), reason="nvidia-resiliency-ext's Python is not here (`make te` installs it)")
def test_a_slow_gpu_is_named_with_its_rank_and_node(config, run_distributed):
    """The second of two ranks, then none, then the first, which was faster before."""
    assert run_distributed(train_with_slow_gpus, 2, config, [(1, 2.0), (0, 1.0), (0, 1.6)]) is True
    records = [record for record in RunFolder(folder(config)).records() if record["kind"] == "stragglers"]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert [record["slowest"] for record in records] == pytest.approx([0.5, 1.0, 0.625])
    assert records[0]["median"] == pytest.approx(0.75) and records[0]["slow"] == {"rank_1": pytest.approx(0.5)}
    assert "slow" not in records[1] and records[2]["slow"] == {"rank_0": pytest.approx(0.625)}
    assert _step_line(records[0], 6) == "step 2/6: GPUs, the slowest at 50% of the fastest; slow: rank 1 50%"


def test_without_a_gpu_it_is_refused(config, run_distributed):
    with pytest.raises(DistributedFailure, match=r"logging\.straggler times the kernels of NVIDIA GPUs"):
        run_distributed(train, 1, config)
