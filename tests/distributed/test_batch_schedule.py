"""`training.batch_schedule` in whole runs: the samples of each step, in all layouts and however often a run stops."""

from __future__ import annotations

import pytest

from plt_megatron.config.schema import BatchStage, RunConfig
from plt_megatron.run_folder.folder import RunFolder, save_config
from plt_megatron.run_folder.status import read_run_status
from tests.checkpoints import read_progress
from tests.distributed.params import layouts, slow
from tests.distributed.schedule_jobs import train_and_tell
from tests.distributed.training_jobs import run_config
from tests.distributed.whole_runs import as_after_step, assert_close, folder, numbers

# Of 32 tokens each: three steps of four samples, then steps of eight, twelve and at last sixteen.
STAGES = [BatchStage(380, 4), BatchStage(1000, 8, 4)]
SIZES = [4, 4, 4, 8, 8, 12, 16, 16]
DP2 = {"data_parallel_size": 2, "overlap_grad_reduce": True}


def samples(sizes: list[int], start: int = 0) -> list[list[int]]:
    """Successive samples in batches of these sizes."""
    firsts = [start + sum(sizes[:number]) for number in range(len(sizes))]
    return [list(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)]


RAMPED = {
    "training": {
        "batch_schedule": STAGES,
        "global_batch_size": 16,
        "train_iters": None,
        "train_tokens": 32 * sum(SIZES) + 100,
    },
    "optimizer": {"lr_warmup_iters": 1},
    "validation": {"interval": 0},
    "checkpoint": {"save_interval": 1, "keep_last": 20},
}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, run_distributed) -> RunConfig:
    """A run on one process that was left alone."""
    config = run_config("whole", tmp_path_factory.mktemp("runs"), data, RAMPED)
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == samples(SIZES)
    return config


def test_records_tell_the_batches_and_rates_follow_tokens(whole):
    records = numbers(whole, "train")
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


@layouts("", slow="DP2, PP2, PP2 DP2, TP2 SP DP2, CP2")
def test_no_layout_changes_a_step_or_its_samples(whole, data, tmp_path, run_distributed, layout):
    parallel = {**layout.settings, "data_parallel_size": layout.dp, "overlap_grad_reduce": layout.dp > 1}
    training = {"micro_batch_size": 4 if layout.cp > 1 else 1}
    config = run_config("other", tmp_path, data, RAMPED, parallel=parallel, training=training)
    done = run_distributed(train_and_tell, layout.world_size, config)
    assert done.result is True and done.steps == samples(SIZES)
    assert_close(config, whole, "loss", "grad_norm", "lr", "tokens")


@pytest.mark.parametrize("step", [3, *(slow(step) for step in (1, 2, 4, 5, 6, 7))])
def test_resumed_at_any_step_a_run_goes_on_bit_for_bit(whole, tmp_path, run_distributed, step):
    config = as_after_step(whole, step, "resumed", tmp_path)
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == samples(SIZES)[step:]
    assert numbers(config) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4, 5])
def test_on_other_data_parallel_ranks_the_samples_and_their_order_are_the_same(whole, tmp_path, run_distributed, step):
    config = as_after_step(whole, step, "resharded", tmp_path, parallel={"data_parallel_size": 2})
    done = run_distributed(train_and_tell, 2, config)
    assert done.result is True and done.steps == samples(SIZES)[step:]
    assert_close(config, whole, "loss")


@pytest.mark.slow
def test_a_stage_that_is_over_may_be_changed_for_more_ranks(whole, tmp_path, run_distributed):
    """Four do not suit eight ranks of one; the run is past them."""
    stages = {"batch_schedule": [BatchStage(380, 8), STAGES[1]]}
    config = as_after_step(whole, 4, "changed", tmp_path, training=stages)
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == samples(SIZES)[4:]
    assert numbers(config) == numbers(whole)


@pytest.mark.slow
def test_a_switch_is_a_change_of_the_batch_by_hand(whole, data, tmp_path, run_distributed):
    """Bit for bit: a run of four samples a step that goes on with eight after its third, at a rate of its own."""
    constant = {"lr_decay_style": "constant", "lr_warmup_iters": 0}
    training = {"batch_schedule": STAGES[:1], "global_batch_size": 8, "train_tokens": 32 * 28}
    scheduled = run_config("scheduled", tmp_path, data, RAMPED, optimizer=constant, training=training)
    by_hand = {"batch_schedule": [], "global_batch_size": 4}
    config = run_config("by hand", tmp_path, data, RAMPED, optimizer=constant, training=training | by_hand)
    for each in (scheduled, config):
        assert run_distributed(train_and_tell, 1, each).result is True
    larger = as_after_step(config, 3, "larger", tmp_path, training={"global_batch_size": 8})
    assert run_distributed(train_and_tell, 1, larger).result is True
    ours = [(record["loss"], record["grad_norm"]) for record in numbers(scheduled, "train")]
    assert ours == [(record["loss"], record["grad_norm"]) for record in numbers(larger, "train")] and len(ours) == 5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_experts_muon_and_averages_do_not_mind_the_batch(data, tmp_path, run_distributed, optimizer):
    """Two data-parallel ranks that share out the experts, and one process. No average with Muon, which has none."""
    experts = {"moe.num_experts": 4, "moe.router_topk": 2, "moe.ffn_hidden_size": 16, "moe.z_loss_coeff": 1e-3}
    training = {"ema_decay": 0.5} if optimizer == "adam" else {}
    changes = {"model": experts, "optimizer": {"name": optimizer}, "training": {**training, "micro_batch_size": 2}}
    one = run_config("one", tmp_path, data, RAMPED, **changes)
    two = run_config("two", tmp_path, data, RAMPED, **changes, parallel={**DP2, "expert_model_parallel_size": 2})
    for config, ranks in ((one, 1), (two, 2)):
        config.validation.interval = 4
        assert run_distributed(train_and_tell, ranks, config).steps == samples(SIZES)
    assert len(numbers(one)) == len(numbers(two)) > len(SIZES)
    for ours, theirs in zip(numbers(two), numbers(one), strict=True):
        assert ours.keys() == theirs.keys() and ("ema_loss" in ours) == (optimizer == "adam" and "lr" not in ours)
        for field in ("loss", "grad_norm", "ema_loss"):
            if field in ours:
                assert ours[field] == pytest.approx(theirs[field], rel=2e-5), field


@pytest.mark.slow
def test_after_a_rollback_over_a_switch_steps_have_the_batches_of_their_tokens(data, tmp_path, run_distributed):
    """The sixth step is bad: back to step 4's checkpoint, on with the samples after the bad step's, in the batches of
    the fifth and sixth steps again."""
    changes = {"training": {"on_nonfinite": "rollback"}, "checkpoint": {"save_interval": 2}}
    config = run_config("rolled", tmp_path, data, RAMPED, **changes)
    done = run_distributed(train_and_tell, 1, config, bad_step=6)
    assert done.result is True
    again = samples(SIZES[4:], start=sum(SIZES[:6]))
    assert [len(step) for step in done.steps] == [*SIZES[:6], *SIZES[4:]]
    length = sum(SIZES)
    assert done.steps == samples(SIZES[:6]) + [[sample % length for sample in step] for step in again]
    assert [record["global_batch_size"] for record in numbers(config, "train")] == SIZES
    assert read_progress(folder(config))["consumed_samples"] == sum(SIZES) + sum(SIZES[4:6])
    assert RunFolder(folder(config)).records()[-1]["tokens"] == 32 * sum(SIZES)
