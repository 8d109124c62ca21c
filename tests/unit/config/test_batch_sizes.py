"""`training.batch_schedule`: the batch of each step, what a run comes to, and what is refused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from plt_megatron.config import derived
from plt_megatron.config.branching import branch_settings, first_decay_step
from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import BatchStage, DataSource, DeepSpeedConfig, LoopStage, RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError

LENGTH = 10


def run(stages: list[BatchStage], size: int = 8, **training: object) -> RunConfig:
    config = RunConfig()
    config.model.vocab_size, config.data.sequence_length = 64, LENGTH
    config.data.sources = [DataSource("corpus")]
    config.training.batch_schedule, config.training.global_batch_size = stages, size
    for name, value in ({"train_tokens": 1000} | training).items():
        setattr(config.training, name, value)
    return config


def walked(sizes: list[tuple[int, int]], last: int, tokens: int, end: int) -> list[int]:
    """The batches of steps from `tokens` to `end`, one step after another. `sizes`: (tokens at which it ends, size)."""
    found = []
    while True:
        size = next((size for until, size in sizes if tokens < until), last)
        if tokens + size * LENGTH > end:
            return found
        found.append(size)
        tokens += size * LENGTH


STAGED = [BatchStage(125, 2), BatchStage(300, 4)]  # 2 x 7 steps end at 140 tokens, 4 x 4 at 300


def test_a_stages_batch_holds_until_a_step_begins_at_its_end():
    config = run(STAGED)
    expected = walked([(125, 2), (300, 4)], 8, 0, 1000)
    assert expected == [2] * 7 + [4] * 4 + [8] * 8
    schedule = BatchSchedule(config)
    assert list(islice(schedule.batches(), len(expected))) == expected
    assert derived.train_iters(config) == len(expected) and derived.run_tokens(config) == 940
    assert derived.order_samples(config) == 94 and schedule.step_in_words == "20 to 80"


@pytest.mark.parametrize("tokens", [0, 20, 125, 139, 140, 299, 300, 640, 999, 1000, 1500])
def test_steps_and_tokens_are_those_of_a_walk(tokens: int):
    for stages in (STAGED, [BatchStage(300, 2, 3)], [BatchStage(45, 2), BatchStage(46, 3), BatchStage(500, 9)], []):
        config = run(stages, size=8)
        schedule = BatchSchedule(config)
        ends = [end for stage in stages for end in ([150, 300] if stage.increment else [stage.until])]
        own = list(zip(ends, schedule.sizes, strict=False))
        expected = walked(own, 8, tokens, 1000)
        assert schedule.steps(1000, tokens) == len(expected)
        assert [size for size, steps in schedule.stretches(tokens, end=1000) for _ in range(steps)] == expected
        for steps in (0, 1, 5, len(expected)):
            taken = list(islice(schedule.batches(tokens), steps))
            assert taken[: len(expected)] == expected[:steps]
            assert schedule.tokens(steps, tokens) == tokens + LENGTH * sum(taken)


def test_without_a_schedule_all_steps_are_alike():
    config = run([], size=6)
    assert derived.train_iters(config) == 16 and derived.run_tokens(config) == 960
    assert derived.mean_step_tokens(config, 3, 180) == derived.tokens_per_step(config) == 60
    assert BatchSchedule(config).step_in_words == "60"


@pytest.mark.parametrize(("start", "increment", "samples", "size"), [(4, 4, 90, 20), (2, 3, 100, 17), (8, 8, 64, 16)])
def test_an_increment_is_the_ramp_of_megatron_lm(start: int, increment: int, samples: int, size: int):
    """`--rampup-batch-size START INCREMENT SAMPLES`, by its own words: so many equal parts of the samples as there are
    increments, and the batch rises after each."""
    config = run([BatchStage(samples * LENGTH, start, increment)], size=size, train_tokens=10_000)
    parts, consumed = (size - start) // increment, 0
    for found in islice(BatchSchedule(config).batches(), 40):
        expected = size if consumed > samples else start + increment * int(consumed * parts / samples)
        assert found == min(expected, size)
        consumed += found


def test_a_runs_end_and_rest_are_counted_from_where_it_is():
    config = run(STAGED)
    assert derived.last_step(config, 7, 140) == 19 and derived.tokens_left(config, 7, 140) == 800
    assert derived.last_step(config, 3, 240) == 3 + 2 + 8, "after three steps of other batches"
    assert derived.tokens_left(config, 19, 940) == 0 and derived.last_step(config, 19, 940) == 19
    assert derived.mean_step_tokens(config, 7, 140) == 800 / 12 and derived.mean_step_tokens(config, 19, 940) == 80
    given = run(STAGED, train_tokens=None, train_iters=9)
    assert derived.run_tokens(given) == 220 and derived.tokens_left(given, 8, 180) == 40


def test_rates_belong_to_tokens_and_branches_to_steps():
    config = run(STAGED)
    assert derived.lr_iters(config) == 12 and derived.lr_decay_iters(config) == 12, "steps of 80 tokens"
    assert [derived.lr_position(config, step) for step in (0, 4, 11, 19)] == [0, 1, 3.75, 11.75]
    config.optimizer.lr_decay_style, config.optimizer.lr_warmup_iters = "WSD", 2
    config.optimizer.lr_wsd_decay_iters = 5
    assert first_decay_step(config) == 14, "seven steps of 80 tokens are done after step 14, not after step 15"
    assert "training.train_iters=12" in branch_settings(config, "checkpoint", step=9, decay=3)
    assert "data.order_samples=94" in branch_settings(config, "checkpoint", step=9, decay=3)
    faster = run([BatchStage(300, 16)])  # one step of 160 tokens warms up as two of 80
    faster.optimizer = config.optimizer
    with pytest.raises(UserError, match="from step 2 to"):
        branch_settings(faster, "checkpoint", step=1, decay=3)
    for step in (7, 15):
        with pytest.raises(UserError, match="has a constant rate from step 8 to 14: it cannot branch at step"):
            branch_settings(config, "checkpoint", step=step, decay=3)


def test_loops_and_batches_that_change_are_counted_together():
    config = run(STAGED, loop_schedule=[LoopStage(0.25, 1), LoopStage(loop_count=2)])
    loops, tokens, counted = LoopSchedule(config), 0, {}
    for step, size in enumerate(walked([(125, 2), (300, 4)], 8, 0, 1000)):
        kind = loops.loop_count(step, tokens), size
        counted[kind] = counted.get(kind, 0) + 1
        tokens += size * LENGTH
    assert loops.step_shares() == pytest.approx({(*kind, LENGTH): count / 19 for kind, count in counted.items()})
    one = sum(size * count for (loop, size), count in counted.items() if loop == 1)
    shares = loops.kind_token_shares()
    assert sum(share for kind, share in shares.items() if kind.loop_count == 1) == pytest.approx(one / 94)
    assert sum(shares.values()) == pytest.approx(1)
    assert loops.step_shares(start=15) == {(2, 8, LENGTH): 1.0}


def test_a_schedule_is_read_and_written(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "training: {batch_schedule: [{until: 20e9, global_batch_size: 2}, "
        "{until: 4e10, global_batch_size: 4, increment: 2}]}\n"
    )
    stages = [BatchStage(20_000_000_000, 2), BatchStage(40_000_000_000, 4, 2)]
    config = load_config(path)
    assert config.training.batch_schedule == stages
    path.write_text(dump_config(config))
    assert load_config(path).training.batch_schedule == stages


@pytest.mark.parametrize(
    ("stages", "changes", "expected"),
    [
        ([BatchStage(-1, 2)], {}, "training.batch_schedule[0].until must be at least 1, got -1"),
        ([BatchStage(125, 0)], {}, "training.batch_schedule[0].global_batch_size must be at least 1, got 0"),
        ([*STAGED, BatchStage(300, 8)], {}, "batch_schedule[2].until 300 must be above 300"),
        ([BatchStage(125, 2), BatchStage(130, 4)], {}, "[1].until 130: one step of 40 tokens does not fit into the 5"),
        ([BatchStage(125, 2, 4)], {}, "increment 4: its global_batch_size 2 does not reach"),
        ([BatchStage(125, 2, 3), BatchStage(300, 4)], {}, "its global_batch_size 2 does not reach training.batch"),
        ([BatchStage(10**15, 1, 1)], {"global_batch_size": 2**24}, "increment 1 makes 16,777,215 batch sizes, more"),
        ([BatchStage(125, 8, 2)], {}, "its global_batch_size 8 does not reach training.global_batch_size 8"),
        ([BatchStage(125, 3)], {"micro_batch_size": 2}, "[0].global_batch_size 3 is not divisible by 2"),
        ([BatchStage(125, 2, 1)], {"micro_batch_size": 2}, "batch_schedule[0].increment 1 is not divisible by 2"),
        (STAGED, {"train_tokens": None, "train_iters": 2, "order": 3}, "order_samples 3 must be between the 4 that"),
    ],
)  # fmt: skip
def test_a_bad_schedule_is_refused_in_one_line(stages, changes, expected):
    config = run(stages)
    config.data.order_samples = changes.pop("order", None)
    for name, value in changes.items():
        setattr(config.training, name, value)
    (problem,) = find_problems(config, check_files=False)
    assert expected in problem


def test_every_batch_must_suit_the_ranks():
    config = run([BatchStage(125, 2), BatchStage(300, 6)])
    assert find_problems(config, check_files=False, world_size=2) == []
    (problem,) = find_problems(run(STAGED), check_files=False, world_size=4)
    assert "training.batch_schedule[0].global_batch_size 2 is not divisible by 4 (training.micro_batch_size" in problem
    config.parallel.pipeline_model_parallel_size = 4
    first, second = find_problems(config, check_files=False)
    assert "microbatches per step: 2 is not divisible by parallel.pipeline_model_parallel_size 4: change" in first
    assert "change training.batch_schedule[0].global_batch_size or" in first and "microbatches per step: 6" in second
    config = run(STAGED)
    config.deepspeed = DeepSpeedConfig()
    (problem,) = find_problems(config, check_files=False)
    assert "training.batch_schedule is not verified with deepspeed" in problem
