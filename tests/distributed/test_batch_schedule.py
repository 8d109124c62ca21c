"""`training.batch_schedule` in whole runs: the samples of each step, in all layouts and however often a run stops."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.config.schema import BatchStage, DataConfig, RunConfig
from plt_megatron.run_folder.checkpoints import read_progress
from plt_megatron.run_folder.folder import RunFolder, save_config
from plt_megatron.run_folder.status import read_run_status
from tests.distributed.schedule_jobs import as_after_step, train_and_tell
from tests.distributed.training_jobs import make_data, run_config
from tests.distributed.whole_runs import folder, numbers

SLOW = pytest.mark.slow
# Of 32 tokens each: three steps of four samples, then steps of eight, twelve and at last sixteen.
STAGES = [BatchStage(380, 4), BatchStage(1000, 8, 4)]
SIZES = [4, 4, 4, 8, 8, 12, 16, 16]
DP2 = {"data_parallel_size": 2, "overlap_grad_reduce": True}
PP2 = {"pipeline_model_parallel_size": 2}


def samples(sizes: list[int], start: int = 0) -> list[list[int]]:
    """Successive samples in batches of these sizes."""
    firsts = [start + sum(sizes[:number]) for number in range(len(sizes))]
    return [list(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_data(tmp_path_factory.mktemp("batch_data"))


def ramped(name: str, output_dir: Path, data: DataConfig, **changes: Any) -> RunConfig:
    training = {
        "batch_schedule": STAGES,
        "global_batch_size": 16,
        "train_iters": None,
        "train_tokens": 32 * sum(SIZES) + 100,
    } | changes.pop("training", {})
    validation, optimizer = {"interval": 0}, {"lr_warmup_iters": 1} | changes.pop("optimizer", {})
    checkpoint = {"save_interval": 1, "keep_last": 20} | changes.pop("checkpoint", {})
    return run_config(
        name, output_dir, data, training=training, validation=validation, optimizer=optimizer, checkpoint=checkpoint,
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, run_distributed) -> RunConfig:
    """A run on one process that was left alone."""
    config = ramped("whole", tmp_path_factory.mktemp("runs"), data)
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == samples(SIZES)
    return config


def trained(config: RunConfig, first: int = 1) -> list[dict[str, Any]]:
    return [record for record in numbers(config) if record["kind"] == "train" and record["step"] >= first]


def test_records_tell_the_batches_and_rates_follow_tokens(whole):
    records = trained(whole)
    assert [record["global_batch_size"] for record in records] == SIZES
    tokens = [32 * sum(SIZES[:step]) for step in range(1, len(SIZES) + 1)]
    assert [record["tokens"] for record in records] == tokens
    # Linear over one step of 16 samples, then a cosine over the whole steps of 16 samples that the run's tokens hold.
    assert [record["lr"] for record in records[:4]] == pytest.approx([0, 3e-3 / 4, 3e-3 / 2, 3e-3 * 3 / 4])
    assert records[6]["lr"] < records[5]["lr"] and records[-1]["source_epochs"]["text"] == pytest.approx(
        records[0]["source_epochs"]["text"] * sum(SIZES) / 4
    )
    save_config(whole, folder(whole) / "config.yaml")
    assert read_run_status(folder(whole)).finished and read_run_status(folder(whole)).tokens_left == 0


@pytest.mark.parametrize(
    ("ranks", "layout", "training"),
    [
        pytest.param(2, DP2, {"micro_batch_size": 1}, marks=SLOW),
        pytest.param(2, PP2, {"micro_batch_size": 1}, marks=SLOW),
        pytest.param(4, {**PP2, **DP2}, {"micro_batch_size": 1}, marks=SLOW),
        pytest.param(4, {**DP2, "tensor_model_parallel_size": 2, "sequence_parallel": True}, {}, marks=SLOW),
        pytest.param(2, {"context_parallel_size": 2}, {"micro_batch_size": 4}, marks=SLOW),
    ],
    ids=["dp2", "pp2", "pp2-dp2", "tp2-dp2", "cp2"],
)
def test_no_layout_changes_a_step_or_its_samples(whole, data, tmp_path, run_distributed, ranks, layout, training):
    config = ramped("other", tmp_path, data, parallel=layout, training=training)
    done = run_distributed(train_and_tell, ranks, config)
    assert done.result is True and done.steps == samples(SIZES)
    for field in ("loss", "grad_norm", "lr", "tokens"):
        expected = [record[field] for record in trained(whole)]
        assert [record[field] for record in trained(config)] == pytest.approx(expected, rel=1e-5), field


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=SLOW) for step in (1, 2, 4, 5, 6, 7))])
def test_resumed_at_any_step_a_run_goes_on_bit_for_bit(whole, tmp_path, run_distributed, step):
    config = as_after_step(whole, step, len(SIZES), "resumed", tmp_path)
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == samples(SIZES)[step:]
    assert numbers(config) == numbers(whole)


@SLOW
@pytest.mark.parametrize("step", [2, 4, 5])
def test_on_other_data_parallel_ranks_the_samples_and_their_order_are_the_same(whole, tmp_path, run_distributed, step):
    config = as_after_step(whole, step, len(SIZES), "resharded", tmp_path, data_parallel_size=2)
    done = run_distributed(train_and_tell, 2, config)
    assert done.result is True and done.steps == samples(SIZES)[step:]
    assert [record["loss"] for record in trained(config)] == pytest.approx(
        [record["loss"] for record in trained(whole)], rel=1e-5
    )


@SLOW
def test_a_stage_that_is_over_may_be_changed_for_more_ranks(whole, tmp_path, run_distributed):
    """Four do not suit eight ranks of one; the run is past them."""
    config = as_after_step(whole, 4, len(SIZES), "changed", tmp_path)
    config.training = dataclasses.replace(config.training, batch_schedule=[BatchStage(380, 8), STAGES[1]])
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == samples(SIZES)[4:]
    assert numbers(config) == numbers(whole)


@SLOW
def test_a_switch_is_a_change_of_the_batch_by_hand(whole, data, tmp_path, run_distributed):
    """Bit for bit: a run of four samples a step that goes on with eight after its third, at a rate of its own."""
    constant = {"lr_decay_style": "constant", "lr_warmup_iters": 0}
    training = {"batch_schedule": STAGES[:1], "global_batch_size": 8, "train_tokens": 32 * 28}
    scheduled = ramped("scheduled", tmp_path, data, optimizer=constant, training=training)
    by_hand = {"batch_schedule": [], "global_batch_size": 4}
    config = ramped("by hand", tmp_path, data, optimizer=constant, training=training | by_hand)
    for each in (scheduled, config):
        assert run_distributed(train_and_tell, 1, each).result is True
    larger = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=8))
    larger = as_after_step(larger, 3, 28 // 4, "larger", tmp_path)
    assert run_distributed(train_and_tell, 1, larger).result is True
    ours = [(record["loss"], record["grad_norm"]) for record in trained(scheduled)]
    assert ours == [(record["loss"], record["grad_norm"]) for record in trained(larger)] and len(ours) == 5


@SLOW
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_experts_muon_and_averages_do_not_mind_the_batch(data, tmp_path, run_distributed, optimizer):
    """Two data-parallel ranks that share out the experts, and one process. No average with Muon, which has none."""
    experts = {"moe.num_experts": 4, "moe.router_topk": 2, "moe.ffn_hidden_size": 16, "moe.z_loss_coeff": 1e-3}
    training = {"ema_decay": 0.5} if optimizer == "adam" else {}
    changes = {"model": experts, "optimizer": {"name": optimizer}, "training": {**training, "micro_batch_size": 2}}
    one = ramped("one", tmp_path, data, **changes)
    two = ramped("two", tmp_path, data, **changes, parallel={**DP2, "expert_model_parallel_size": 2})
    for config, ranks in ((one, 1), (two, 2)):
        config.validation.interval = 4
        assert run_distributed(train_and_tell, ranks, config).steps == samples(SIZES)
    assert len(numbers(one)) == len(numbers(two)) > len(SIZES)
    for ours, theirs in zip(numbers(two), numbers(one), strict=True):
        assert ours.keys() == theirs.keys() and ("ema_loss" in ours) == (optimizer == "adam" and "lr" not in ours)
        for field in ("loss", "grad_norm", "ema_loss"):
            if field in ours:
                assert ours[field] == pytest.approx(theirs[field], rel=2e-5), field


@SLOW
def test_after_a_rollback_over_a_switch_steps_have_the_batches_of_their_tokens(data, tmp_path, run_distributed):
    """The sixth step is bad: back to step 4's checkpoint, on with the samples after the bad step's, in the batches of
    the fifth and sixth steps again."""
    config = ramped("rolled", tmp_path, data, training={"on_nonfinite": "rollback"}, checkpoint={"save_interval": 2})
    done = run_distributed(train_and_tell, 1, config, bad_step=6)
    assert done.result is True
    again = samples(SIZES[4:], start=sum(SIZES[:6]))
    assert [len(step) for step in done.steps] == [*SIZES[:6], *SIZES[4:]]
    length = sum(SIZES)
    assert done.steps == samples(SIZES[:6]) + [[sample % length for sample in step] for step in again]
    assert [record["global_batch_size"] for record in trained(config)] == SIZES
    assert read_progress(folder(config))["consumed_samples"] == sum(SIZES) + sum(SIZES[4:6])
    assert RunFolder(folder(config)).records()[-1]["tokens"] == 32 * sum(SIZES)
