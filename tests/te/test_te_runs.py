"""Whole training runs in FP8: what is recorded, and that a run stopped in between goes on bit for bit."""

from __future__ import annotations

import pytest

from plt_megatron.config.schema import BatchStage
from tests.distributed.training_jobs import make_data, run_config, train
from tests.distributed.whole_runs import as_after_step, numbers
from tests.te import te_jobs as jobs

MODEL = {"num_layers": 2, **jobs.FP8_MODEL, "kv_channels": 128}
TRAINING = {
    "precision": "bf16",
    "train_iters": 4,
    "fp8.format": "hybrid",
    "fp8.recipe": "delayed",
    "fp8.attention": True,
}
AVERAGED = {**TRAINING, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A configuration by name and layout."""
    data = make_data(tmp_path_factory.mktemp("data"))
    runs = tmp_path_factory.mktemp("runs")

    def config(name, training=AVERAGED, **parallel):
        parallel = {**jobs.UNFUSED, **parallel}
        return run_config(name, runs, data, model=MODEL, training=training, parallel=parallel)

    return config


@pytest.fixture(scope="module")
def whole(make, run_te):
    config = make("whole")
    assert run_te(train, 1, config, timeout_s=240) is True
    return config


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, run_te):
    config = as_after_step(whole, 2, "resumed", tmp_path)
    assert run_te(train, 1, config, timeout_s=240) is True
    assert numbers(config) == numbers(whole)
    assert {"loss", "grad_norm", "gate_mean", "hidden_norm", "step_size"} <= numbers(whole)[0].keys()


def test_over_a_switch_of_the_batch_a_stopped_run_goes_on_bit_for_bit(make, tmp_path, run_te):
    """Histories of scales go on although a step has twice as many microbatches from the third on."""
    ramp = {**TRAINING, "batch_schedule": [BatchStage(2 * 4 * 32, 4)]}
    whole = make("ramped", ramp)
    assert run_te(train, 1, whole, timeout_s=240) is True
    assert [record["global_batch_size"] for record in numbers(whole, "train")] == [4, 4, 8, 8]
    resumed = as_after_step(whole, 2, "resumed", tmp_path)
    assert run_te(train, 1, resumed, timeout_s=240) is True
    assert numbers(resumed) == numbers(whole)


def test_the_average_is_validated_in_fp8_and_changes_no_step(whole, make, run_te):
    config = make("without", TRAINING)
    assert run_te(train, 1, config, timeout_s=240) is True
    theirs = numbers(whole)
    averages = [record.pop("ema_loss") for record in theirs if record["kind"] == "validation"]
    assert theirs == numbers(config)
    losses = [record["loss"] for record in theirs if record["kind"] == "validation"]
    assert averages == pytest.approx(losses, rel=0.05) and averages != losses


def test_tensor_and_sequence_parallel_ranks_are_close(whole, make, run_te):
    config = make("two ranks", tensor_model_parallel_size=2, sequence_parallel=True)
    assert run_te(train, 2, config, timeout_s=240) is True
    steps = [[record for record in numbers(run) if "grad_norm" in record] for run in (config, whole)]
    for record, expected in zip(*steps, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.2)
