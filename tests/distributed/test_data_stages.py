"""`data.stages` in whole runs: the order of the samples and how far sources are, through stops and on other ranks."""

from __future__ import annotations

import dataclasses

import pytest

from plt_megatron.config.schema import BatchStage, DataConfig, DataSource, DataStage, RunConfig, SpikeConfig
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.resuming import branch_config
from tests.distributed.params import slow
from tests.distributed.pool import DistributedFailure
from tests.distributed.schedule_jobs import train_and_tell
from tests.distributed.training_jobs import make_data, run_config, train_with_other_loss
from tests.distributed.whole_runs import as_after_step, folder, numbers

# Of 32 tokens each: 12 samples of one mix, 14 of another (and 20 tokens), in batches that do not end with them.
STAGES = [DataStage(384, []), DataStage(852, [])]
SIZES = [4, 4, 8, 8, 8, 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    one = make_data(tmp_path_factory.mktemp("one"))
    two = make_data(tmp_path_factory.mktemp("two"), seed=8, tokenizer=one.tokenizer)
    first = DataSource(one.sources[0].path, name="first")
    second = DataSource(two.sources[0].path, name="second")
    mixes = [[first], [dataclasses.replace(first, weight=3.0), second]]
    stages = [dataclasses.replace(stage, sources=mix) for stage, mix in zip(STAGES, mixes, strict=True)]
    return dataclasses.replace(one, sources=[second], stages=stages)


STAGED = {
    "training": {"batch_schedule": [BatchStage(256, 4)], "train_iters": None, "train_tokens": 32 * sum(SIZES)},
    "validation": {"interval": 3, "iters": 1, "loop_counts": [2]},
    "checkpoint": {"save_interval": 1, "keep_last": 20},
}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, run_distributed) -> RunConfig:
    config = run_config("whole", tmp_path_factory.mktemp("runs"), data, STAGED)
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and sum(done.steps, []) == list(range(sum(SIZES)))
    return config


def test_records_have_the_epochs_of_each_stage(whole):
    epochs = [record["source_epochs"] for record in numbers(whole, "train")]
    drawn = [(4, 0), (8, 0), (12 + 3, 1), (12 + 9, 3), (12 + 10.5, 3.5 + 6), (12 + 10.5, 3.5 + 14)]
    one, other = epochs[0]["first"] / 4, epochs[-1]["second"] / 17.5
    for found, (first, second) in zip(epochs, drawn, strict=True):
        # An estimate of a source's samples is rounded up in each stage.
        assert found["first"] == pytest.approx(first * one, rel=0.06)
        assert found["second"] == pytest.approx(second * other, rel=0.2, abs=1e-9)


@pytest.mark.parametrize(
    ("step", "ranks", "layout"),
    [
        (3, 2, {"data_parallel_size": 2}),
        *(slow(step, 1, {}) for step in (1, 2, 3, 4, 5)),
        slow(2, 2, {"pipeline_model_parallel_size": 2}),
        slow(4, 4, {"data_parallel_size": 2, "tensor_model_parallel_size": 2}),
    ],
    ids=str,
)
def test_resumed_anywhere_a_run_reads_on_in_order(whole, tmp_path, run_distributed, step, ranks, layout):
    config = as_after_step(whole, step, "other", tmp_path, parallel=layout)
    done = run_distributed(train_and_tell, ranks, config)
    assert done.result is True and sum(done.steps, []) == list(range(sum(SIZES[:step]), sum(SIZES)))
    assert [len(batch) for batch in done.steps] == SIZES[step:]
    if not layout:
        assert numbers(config) == numbers(whole)
    for one, other in zip(numbers(config), numbers(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one.get("source_epochs") == other.get("source_epochs")


def test_a_stage_is_no_spike(data, tmp_path, run_distributed):
    """Losses of the second stage, which the fourth step begins in, are far higher than those of the first."""
    guard = {"spikes": SpikeConfig("rollback", window=4), "max_skipped_steps": 2}
    config = run_config("harder", tmp_path, data, STAGED, training=guard)
    assert run_distributed(train_with_other_loss, 1, config, first_sample=8) is True
    assert RunFolder.of(config).bad_steps() == 0


@pytest.mark.slow
def test_with_other_stages_a_run_does_not_go_on_unasked(whole, data, tmp_path, run_distributed):
    config = as_after_step(whole, 3, "other", tmp_path)
    later = [dataclasses.replace(data.stages[0], until=416), data.stages[1]]
    config.data = dataclasses.replace(data, stages=later)
    with pytest.raises(DistributedFailure, match=r"other data\.stages"):
        run_distributed(train_and_tell, 1, config)


@pytest.mark.slow
def test_a_decay_branch_is_a_run_of_its_own_length(data, tmp_path, run_distributed):
    """Bit for bit, over stages and a switch of the batch: a run of five steps, and the branch of one of six."""
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_warmup_iters": 1}
    order = dataclasses.replace(data, order_samples=sum(SIZES))
    by_steps = {"train_tokens": None, "train_iters": 6}
    trunk, alone = (
        run_config(name, tmp_path, order, STAGED, optimizer=wsd, training={**by_steps, "train_iters": steps})
        for name, steps in (("trunk", 6), ("alone", 5))
    )
    for config in (trunk, alone):
        RunFolder.of(config).save_config(config)
        assert run_distributed(train_and_tell, 1, config).result is True
    branch = branch_config(f"{folder(trunk)}@2", ["name=branch"], decay=3)
    assert branch.data.order_samples == sum(SIZES) and branch.training.train_iters == 5
    done = run_distributed(train_and_tell, 1, branch)
    assert done.result is True and sum(done.steps, []) == list(range(8, sum(SIZES[:5])))
    assert numbers(branch) == [record for record in numbers(alone) if record["step"] > 2] and numbers(branch)


@pytest.mark.slow
def test_after_a_rollback_the_last_steps_read_the_last_stage(data, tmp_path, run_distributed):
    """The fourth step is bad: its samples and the third step's are not read again, so that the order ends too early."""
    changes = {"training": {"on_nonfinite": "rollback"}, "checkpoint": {"save_interval": 2}}
    config = run_config("rolled", tmp_path, data, STAGED, **changes)
    done = run_distributed(train_and_tell, 1, config, bad_step=4)
    assert done.result is True
    last_stage, length = 852 // 32, sum(SIZES)
    read_on = [*range(24, length), *range(last_stage, length), *range(last_stage, length)]
    assert sum(done.steps, []) == [*range(24), *read_on[: sum(SIZES[2:])]]
