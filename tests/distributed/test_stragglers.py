"""Slow GPUs are named by nvidia-resiliency-ext's own Python, over kernels whose times are made up."""

from __future__ import annotations

import pytest

from plt_megatron.config.schema import RunConfig
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm.status import _step_line
from tests.distributed.pool import DistributedFailure
from tests.distributed.straggler_jobs import NVRX, train_with_slow_gpus
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import folder


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
