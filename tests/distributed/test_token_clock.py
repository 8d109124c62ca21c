"""Tokens are a run's clock: with another batch size its end, learning rate and data stay where they would have been."""

from __future__ import annotations

import dataclasses

import pytest

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.run_folder.folder import save_config
from plt_megatron.run_folder.status import read_run_status
from tests.distributed.schedule_jobs import train_and_tell
from tests.distributed.training_jobs import run_config, train, train_in_turns
from tests.distributed.whole_runs import as_after_step, folder, numbers

# Six steps of eight samples.
BY_TOKENS = {"training": {"train_iters": None, "train_tokens": 6 * 256}, "validation": {"interval": 0}}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, run_distributed) -> RunConfig:
    """A run of so many tokens, left alone."""
    config = run_config("whole", tmp_path_factory.mktemp("runs"), data, BY_TOKENS)
    assert run_distributed(train, 1, config) is True
    return config


@pytest.mark.parametrize(
    ("batch", "tokens", "halves"),
    [(16, [1536], [8]), (4, [1152, 1280, 1408, 1536], [8, 9, 10, 11])],
    ids=["larger", "smaller"],
)
def test_with_another_batch_a_run_takes_the_tokens_it_was_given(
    whole, tmp_path, run_distributed, batch, tokens, halves
):
    config = as_after_step(whole, 4, "other", tmp_path, training={"global_batch_size": batch})
    assert run_distributed(train, 1, config) is True
    undisturbed, ours = numbers(whole, "train"), numbers(config, "train")
    assert ours[:4] == undisturbed[:4]
    assert [record["tokens"] for record in ours[4:]] == tokens
    # Rates by tokens: the schedule goes on in steps of eight samples, of which these positions are twice.
    rates = {2 * index: record["lr"] for index, record in enumerate(undisturbed)}
    assert [record["lr"] for record, half in zip(ours[4:], halves, strict=True) if half in rates] == [
        rates[half] for half in halves if half in rates
    ]
    assert all(one["lr"] > other["lr"] for one, other in zip(ours[3:], ours[4:], strict=False))
    assert ours[-1]["source_epochs"] == undisturbed[-1]["source_epochs"]
    assert read_run_status(folder(config)).checkpoint == ours[-1]["step"]


def test_of_an_uploaded_checkpoint_it_reads_on_in_the_order_too(whole, tmp_path, run_distributed):
    """Ten samples a step, of which a run of its own would draw 40 in all, not 48."""
    load = {"load": f"file://{folder(whole)}/checkpoints/step_00000004"}
    changes = {"training": {"global_batch_size": 10}, "checkpoint": load}
    config = run_config("elsewhere", tmp_path, whole.data, BY_TOKENS, **changes)
    assert derived.order_samples(config) == 40
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and done.steps == [list(range(32, 42))]


@pytest.mark.parametrize(("length", "batch", "first", "last"), [(64, 4, 16, 24), (16, 16, 64, 96)])
def test_with_rows_of_another_length_it_reads_on_at_the_same_token(
    whole, tmp_path, run_distributed, length, batch, first, last
):
    """Not at the same sample: four steps have read 32 of them, 1,024 tokens."""
    data = dataclasses.replace(whole.data, sequence_length=length)
    config = run_config("other rows", tmp_path, data, BY_TOKENS, training={"global_batch_size": batch})
    config.checkpoint = dataclasses.replace(
        config.checkpoint, load=f"{folder(whole)}/checkpoints/step_00000004", allow_other_data=True
    )
    done = run_distributed(train_and_tell, 1, config)
    assert done.result is True and sum(done.steps, []) == list(range(first, last))


def test_after_a_change_of_batch_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, run_distributed):
    smaller = {"global_batch_size": 4}
    one, other = (as_after_step(whole, 4, name, tmp_path, training=smaller) for name in ("one", "other"))
    assert run_distributed(train, 1, one) is True
    train_in_turns(run_distributed, 1, other)
    assert numbers(other) == numbers(one)


def test_a_runs_status_counts_its_tokens(whole, tmp_path, run_distributed):
    config = as_after_step(whole, 4, "looked at", tmp_path, training={"global_batch_size": 16})
    save_config(config, folder(config) / "config.yaml")
    records = (folder(config) / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder(config) / "metrics.jsonl").write_text("".join(records[:4]))
    status = read_run_status(folder(config))
    assert (status.step, status.steps, status.finished) == (4, 5, False)
    assert run_distributed(train, 1, config) is True
    assert read_run_status(folder(config)).finished


def test_tokens_are_counted_where_steps_decide(data, tmp_path, run_distributed):
    """A run of six steps, the last two of them with twice as many samples."""
    first = run_config("first", tmp_path, data, validation={"interval": 0})
    assert run_distributed(train, 1, first) is True
    config = as_after_step(first, 4, "second", tmp_path, training={"global_batch_size": 16})
    config.checkpoint = dataclasses.replace(config.checkpoint, allow_other_data=True)
    assert run_distributed(train, 1, config) is True
    assert [record["tokens"] for record in numbers(config, "train")] == [256, 512, 768, 1024, 1536, 2048]
    assert [record["lr"] for record in numbers(config, "train")] == [record["lr"] for record in numbers(first, "train")]
