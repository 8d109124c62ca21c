"""Whole training runs in FP8: what is recorded, and that a run stopped in between goes on bit for bit."""

from __future__ import annotations

import shutil

import pytest

from tests.distributed.training_jobs import make_data, run_config
from tests.distributed.whole_runs import folder, numbers
from tests.te import te_jobs as jobs

MODEL = {"num_layers": 2, **jobs.FP8_MODEL, "kv_channels": 128}
TRAINING = {"precision": "bf16", "train_iters": 4, "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_attention": True}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A configuration by name and layout."""
    data = make_data(tmp_path_factory.mktemp("data"))
    runs = tmp_path_factory.mktemp("runs")
    kinds = {"model": MODEL, "training": TRAINING}
    return lambda name, **parallel: run_config(name, runs, data, **kinds, parallel={**jobs.UNFUSED, **parallel})


@pytest.fixture(scope="module")
def whole(make, run_te):
    config = make("whole")
    assert run_te(jobs.run_whole, 1, config, timeout_s=240) is True
    return config


def test_a_stopped_run_goes_on_bit_for_bit(whole, make, run_te):
    config = make("resumed")
    shutil.copytree(folder(whole), folder(config))
    shutil.rmtree(folder(config) / "checkpoints" / "step_00000004")
    (folder(config) / "checkpoints" / "latest").write_text("step_00000002\n")
    assert run_te(jobs.run_whole, 1, config, timeout_s=240) is True
    assert numbers(config) == numbers(whole)
    assert {"loss", "grad_norm", "gate_mean", "hidden_norm", "step_size"} <= numbers(whole)[0].keys()


@pytest.mark.slow
def test_tensor_and_sequence_parallel_ranks_are_close(whole, make, run_te):
    config = make("two ranks", tensor_model_parallel_size=2, sequence_parallel=True)
    assert run_te(jobs.run_whole, 2, config, timeout_s=240) is True
    steps = [[record for record in numbers(run) if "grad_norm" in record] for run in (config, whole)]
    for record, expected in zip(*steps, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.2)
