"""`training.loop_schedule`: the loops of each step, what they come to, and what is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from plt_megatron.config import derived
from plt_megatron.config.branching import stages_problem
from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schema import (
    BatchStage,
    DataSource,
    DeepSpeedConfig,
    Fp8Config,
    LoopStage,
    RunConfig,
    SpikeConfig,
)
from plt_megatron.config.validation import find_problems


def run(stages: list[LoopStage], steps: int = 10, loops: int = 2, **training: object) -> RunConfig:
    config = RunConfig()
    config.model.loop_count, config.model.vocab_size = loops, 64
    config.data.sources = [DataSource("corpus")]
    config.training.loop_schedule = stages
    config.training.train_iters = steps
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


def counts(config: RunConfig, steps: int, step_tokens: int = 0) -> list[int]:
    return [LoopSchedule(config).loop_count(step, step * step_tokens) for step in range(steps)]


def test_without_a_schedule_every_step_has_the_models_loops():
    assert counts(run([], loops=3), 4) == [3, 3, 3, 3]
    assert LoopSchedule(run([], loops=3)).mean_shares() == {3: 1.0}


def test_stages_end_at_their_share_of_the_steps():
    config = run([LoopStage(0.3, 1), LoopStage(0.7, 3), LoopStage(loop_count=2)], loops=3)
    assert counts(config, 10) == [1, 1, 1, 3, 3, 3, 3, 2, 2, 2]
    assert LoopSchedule(config).mean_shares() == pytest.approx({1: 0.3, 2: 0.3, 3: 0.4})
    assert LoopSchedule(config).mean_shares(start=5) == pytest.approx({2: 0.6, 3: 0.4})
    assert LoopSchedule(config).mean_shares(start=10) == {2: 1.0}, "a finished run's last step"


def test_where_tokens_are_the_clock_a_switch_belongs_to_a_number_of_them():
    config = run([LoopStage(0.5, 1), LoopStage(loop_count=2)], train_iters=None, train_tokens=8 * 256 * 9)
    assert counts(config, 9, step_tokens=8 * 256) == [1] * 5 + [2] * 4
    config.training.global_batch_size = 4  # from now on: twice as many steps
    assert counts(config, 18, step_tokens=4 * 256) == [1] * 9 + [2] * 9


def test_drawn_loops_have_their_shares_and_follow_from_the_seed():
    config = run([LoopStage(loop_shares=[0.2, 0.0, 0.5, 0.3])], steps=4000, loops=4)
    drawn = counts(config, 4000)
    assert Counter(drawn) == pytest.approx({1: 800, 3: 2000, 4: 1200}, rel=0.08)
    assert drawn[:12] == [3, 1, 4, 3, 4, 3, 1, 1, 4, 3, 4, 3], "the same on any machine, whatever was drawn before"
    assert counts(run(config.training.loop_schedule, 4000, 4, seed=7), 4000) != drawn
    assert LoopSchedule(config).mean_shares() == pytest.approx({1: 0.2, 3: 0.5, 4: 0.3})


def test_a_ramp_goes_over_from_the_stage_before():
    config = run([LoopStage(0.5, 1), LoopStage(loop_count=2, ramp=0.8)], steps=10_000)
    drawn = counts(config, 10_000)
    assert set(drawn[:5000]) == {1} and set(drawn[9000:]) == {2}
    parts = [sum(loops == 2 for loops in drawn[first : first + 1000]) / 1000 for first in range(5000, 9000, 1000)]
    assert parts == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.04)
    assert LoopSchedule(config).mean_shares() == pytest.approx({1: 0.7, 2: 0.3}, abs=1e-4)
    assert LoopSchedule(config).mean_shares(start=7000) == pytest.approx({1: 1 / 6, 2: 5 / 6}, abs=1e-3)


def test_a_schedule_is_read_and_written(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {loop_schedule: [{until: 0.25, loop_count: 1}, {loop_shares: [0.5, 0.5], ramp: 0.1}]}\n")
    stages = [LoopStage(0.25, 1), LoopStage(loop_shares=[0.5, 0.5], ramp=0.1)]
    config = load_config(path)
    assert config.training.loop_schedule == stages
    path.write_text(dump_config(config))
    assert load_config(path).training.loop_schedule == stages
    (problem,) = [line for line in find_problems(config, check_files=False) if "loop_schedule" in line] or [""]
    assert not problem
    config.training.loop_schedule[0].until = 2.0
    assert any(line.startswith(f"{path}:") and "[0].until" in line for line in find_problems(config, check_files=False))


ONE, TWO = LoopStage(0.5, 1), LoopStage(loop_count=2)
# Of 1,024 rows first 64 steps of 4, then one of 768, which begins at a quarter of the run.
GROWING = {
    "train_iters": None,
    "train_tokens": 1024 * 256,
    "global_batch_size": 768,
    "batch_schedule": [BatchStage(256 * 256, 4)],
}


@pytest.mark.parametrize(
    ("stages", "changes", "expected"),
    [
        ([LoopStage(1.5, 1), TWO], {}, "training.loop_schedule[0].until must be at most 1, got 1.5"),
        ([LoopStage(0.0, 1), TWO], {}, "training.loop_schedule[0].until must be above 0, got 0.0"),
        ([ONE, LoopStage(0.5, 2), TWO], {}, "loop_schedule[1].until 0.5 must be above 0.5"),
        ([ONE, LoopStage(loop_count=2, loop_shares=[1.0])], {}, "[1]: give either loop_count or loop_shares"),
        ([ONE, LoopStage(loop_count=3)], {}, "loop_schedule[1].loop_count: 3 loops are above model.loop_count 2"),
        (
            [LoopStage(loop_shares=[0.5, 0.2, 0.3])],
            {},
            "loop_schedule[0].loop_shares: 3 loops are above model.loop_count 2",
        ),
        ([LoopStage(loop_shares=[0.5, 0.6])], {}, "training.loop_schedule[0].loop_shares must add up to 1, not 1.1"),
        (
            [LoopStage(loop_shares=[0.5, -0.5])],
            {},
            "training.loop_schedule[0].loop_shares[1] must be at least 0, got -0.5",
        ),
        ([LoopStage(0.5, 1, ramp=0.5), TWO], {}, "[0].ramp 0.5: there is no stage before it to ramp from"),
        ([LoopStage(loop_shares=[1.0, 0.0])], {}, "never runs model.loop_count 2 loops: set model.loop_count=1"),
        (
            [ONE, LoopStage(0.51, 2), LoopStage(0.59, 1), TWO],
            {},
            "loop_schedule[2].until 0.59: no step of the run's 10 begins",
        ),
        ([LoopStage(0.3, 1), TWO], GROWING, "loop_schedule[1].until 1.0: no step of the run's 65 begins"),
        ([], {"loop_loss_weights": [0.5, 0.5]}, "loop_loss_weights has 2 weights, but 1 of model.loop_count 2"),
        ([], {"loop_loss_weights": [-0.5]}, "training.loop_loss_weights[0] must be at least 0, got -0.5"),
        ([ONE, TWO], {"fp8": Fp8Config()}, "training.fp8 does not run with training.loop_schedule yet: leave"),
    ],
)
def test_a_bad_schedule_is_refused_in_one_line(stages, changes, expected):
    (problem,) = find_problems(run(stages, **changes), check_files=False)
    assert expected in problem


def test_the_model_has_its_loops_where_no_stage_says_another_number():
    given = run([LoopStage(0.3, 1), LoopStage(0.6, 2)], loops=3)
    spelled_out = run([LoopStage(0.3, 1), LoopStage(0.6, 2), LoopStage(1.0, 3)], loops=3)
    unsaid = run([LoopStage(0.3, 1), LoopStage(0.6, 2), LoopStage()], loops=3)
    assert counts(given, 10) == counts(spelled_out, 10) == counts(unsaid, 10) == [1] * 3 + [2] * 3 + [3] * 4
    assert LoopSchedule(given).step_shares() == LoopSchedule(spelled_out).step_shares()
    assert [find_problems(config, check_files=False) for config in (given, spelled_out, unsaid)] == [[], [], []]
    assert "3 stages" in (stages_problem(given) or "") and stages_problem(run([])) is None


def test_spikes_may_be_looked_for_since_each_loop_count_has_losses_of_its_own():
    config = run([ONE, TWO], spikes=SpikeConfig("rollback"))
    config.checkpoint.save_interval = 5
    assert find_problems(config, check_files=False) == []


def test_the_steps_of_a_stage_are_those_that_begin_in_it():
    config = run([LoopStage(0.015, 1), TWO], **GROWING)
    assert find_problems(config, check_files=False) == []
    assert LoopSchedule(config).stage_steps() == [4, 61] and derived.train_iters(config) == 65
    assert LoopSchedule(run([LoopStage(0.01, 1), TWO])).stage_steps() == [1, 9]


@pytest.mark.parametrize(
    ("weights", "loops", "expected"),
    [([], 3, []), ([0.5], 1, []), ([0.5], 2, [0.5]), ([0.5], 4, [0.5] * 3), ([0.5, 0.0], 3, [0.5, 0.0])],
)
def test_a_single_weight_is_that_of_all_earlier_loops(weights, loops, expected):
    config = run([], loop_loss_weights=weights)
    config.model.loop_count = loops
    assert find_problems(config, check_files=False) == []
    assert derived.loop_loss_weights(config, loops) == expected
    losses = [loop for loop, weight in enumerate(expected, start=1) if weight] + [loops]
    assert derived.loops_with_loss(config, loops) == losses


def test_losses_on_earlier_loops_run_in_a_pipeline_and_on_deepspeed():
    config = run([], loop_loss_weights=[0.5])
    config.parallel.pipeline_model_parallel_size = 2
    assert find_problems(config, check_files=False) == []
    config = dataclasses.replace(run([], loop_loss_weights=[0.5]), deepspeed=DeepSpeedConfig())
    assert find_problems(config, check_files=False) == []
