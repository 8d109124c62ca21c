"""Which steps are accepted, and what the guard is told; what is done about bad ones is tried in tests/distributed."""

from __future__ import annotations

import json
import math
from typing import Literal

import pytest

from plt_megatron.config.schema import DataConfig, DataStage, LengthStage, OptimizerConfig, SpikeConfig, TrainingConfig
from plt_megatron.train.callbacks.base import Step
from plt_megatron.train.callbacks.incidents import Incidents, StepGuard, StepKind
from tests.unit.train.callbacks.a_run import a_run


def guard(on_spike: Literal["skip", "rollback"] | None = None, threshold: float = 6.0, **settings) -> StepGuard:
    spikes = None if on_spike is None else SpikeConfig(on_spike, threshold, window=8)
    return StepGuard(TrainingConfig(spikes=spikes, **settings))


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_not_accepted(loss, grad_norm):
    judge = guard(on_nonfinite="rollback")
    assert judge.accept(2.0, 1.0) and judge.problem is None
    assert not judge.accept(loss, grad_norm)
    assert judge.action == "rollback" and "not finite" in judge.problem
    assert judge.accept(2.0, 1.0) and judge.problem is None


def test_spikes_count_only_when_asked_and_only_upwards():
    losses = [2.0, 2.1, 1.9, 2.05, 1.95]
    assert all(guard().accept(loss, 1.0) for loss in [*losses, 50.0])
    judge = guard(on_spike="skip", threshold=4.0)
    assert all(judge.accept(loss, 1.0) for loss in losses)
    assert not judge.accept(5.0, 1.0)
    assert "spike" in judge.problem and judge.action == "skip"
    assert judge.accept(0.5, 1.0), "a fall is no spike"


def test_steps_in_which_no_token_counts_are_no_measure():
    judge = guard(on_spike="skip", threshold=4.0)
    assert all(judge.accept(loss, 1.0) for loss in [2.0, 2.1, 0.0, 1.9, 0.0, 2.05, 0.0, 1.95])
    assert judge.statistics()["min"] == 1.9
    assert not judge.accept(5.0, 1.0), "an empty step would have widened the deviation"


def test_a_spike_needs_losses_to_compare_with():
    judge = guard(on_spike="skip")
    assert judge.accept(2.0, 1.0) and judge.accept(90.0, 1.0)


LOWER, HIGHER = [2.0, 2.1, 1.9, 2.05, 1.95], [5.0, 5.1, 4.9, 5.05, 4.95]


@pytest.mark.parametrize(
    "then",
    [(1, 1, 64, 2, 8), (0, 1, 64, 2, 8), (0, 0, 128, 2, 8), (0, 0, 64, 3, 8), (0, 0, 64, 2, 4)],
    ids=["data", "data of both", "length", "loops", "smaller batch"],
)
def test_after_a_planned_change_losses_from_before_are_no_measure(then):
    judge = guard(on_spike="rollback")
    judge.kind = StepKind(0, 0, 64, 2, 8)
    assert all(judge.accept(loss, 1.0) for loss in LOWER)
    judge.kind = StepKind(*then)
    assert all(judge.accept(loss, 1.0) for loss in HIGHER), judge.problem
    assert not judge.accept(90.0, 1.0), "its own losses are"


def test_kinds_of_steps_that_take_turns_are_measured_by_their_own_losses():
    judge, kinds = guard(on_spike="skip"), [StepKind(loop_count=1), StepKind(loop_count=2)]
    for pair in zip(HIGHER, LOWER, strict=True):
        for judge.kind, loss in zip(kinds, pair, strict=True):
            assert judge.accept(loss, 1.0), judge.problem
    judge.kind = kinds[1]
    assert not judge.accept(5.0, 1.0) and judge.statistics()["max"] == 2.1


def test_a_larger_batch_is_measured_by_the_losses_of_smaller_ones():
    judge = guard(on_spike="skip")
    for size, loss in enumerate(LOWER, 1):
        judge.kind = StepKind(global_batch_size=size)
        assert judge.accept(loss, 1.0)
    judge.kind = StepKind(global_batch_size=9)
    assert not judge.accept(5.0, 1.0)


def test_after_a_rollback_the_losses_are_those_up_to_the_checkpoint_and_the_count_stays():
    judge = guard(on_spike="rollback", max_skipped_steps=2)
    assert all(judge.accept(loss, 1.0) for loss in HIGHER)
    state = judge.state()
    assert all(judge.accept(loss, 1.0) for loss in 2 * LOWER)
    assert not judge.accept(9.0, 1.0)
    judge.restore_losses(state)
    assert judge.accept(5.0, 1.0), "the weights are again those whose losses were higher"
    assert not judge.accept(9.0, 1.0) and judge.action == "rollback"
    assert not judge.accept(9.0, 1.0) and judge.too_many and judge.action == "fail"


def test_the_losses_of_a_checkpoint_without_kinds_are_left_out():
    judge = guard(on_spike="skip")
    judge.restore({"losses": LOWER, "skipped": [3], "step": 5, "in_a_row": 0})
    assert judge.accept(90.0, 1.0) and judge.statistics()["steps"] == 1


@pytest.mark.parametrize("between", [[], [2.0]], ids=["in a row", "altogether"])
def test_too_many_end_the_run(between):
    judge = guard(max_skipped_steps=2)
    actions = []
    for _ in range(3):
        assert not judge.accept(math.nan, 1.0)
        actions.append(judge.action)
        assert all(judge.accept(loss, 1.0) for loss in between)
    assert actions == ["skip", "skip", "fail"] and judge.too_many


def test_old_skips_are_forgiven():
    judge = guard(max_skipped_steps=1)
    for _ in range(3):
        assert not judge.accept(math.nan, 1.0)
        assert judge.action == "skip"
        assert all(judge.accept(2.0, 1.0) for _ in range(1000))


def test_rolling_back_to_the_same_checkpoint_has_an_end():
    """However many steps lie between it and the bad one."""
    judge = guard(on_nonfinite="rollback", max_skipped_steps=2)
    state = judge.state()
    for action in ("rollback", "rollback", "fail"):
        assert all(judge.accept(2.0, 1.0) for _ in range(1500))
        assert not judge.accept(math.nan, 1.0) and judge.action == action
        judge.restore_losses(state)


def test_a_resumed_guard_judges_as_one_that_never_stopped():
    judge, resumed = guard(on_spike="skip", max_skipped_steps=1), guard(on_spike="skip", max_skipped_steps=1)
    resumed.kind = judge.kind = StepKind(0, 0, 64, 2, 8)
    for loss in (2.0, 2.1, math.nan, 1.9):
        judge.accept(loss, 1.0)
    resumed.restore(json.loads(json.dumps(judge.state())))
    for loss in (2.0, 9.0, 2.0):
        assert judge.accept(loss, 1.0) == resumed.accept(loss, 1.0)
        assert (judge.problem, judge.action) == (resumed.problem, resumed.action)


@pytest.fixture
def run(tmp_path):
    """A stage of data ends with sample 12."""
    run = a_run(tmp_path)
    run.config.data = DataConfig(stages=[DataStage(400, [])], sequence_length=32)
    run.config.training = TrainingConfig(spikes=SpikeConfig("rollback", window=8), max_skipped_steps=1)
    return run


def judge(callback: Incidents, samples: int, size: int = 4, length: int = 32, loops: int = 2, loss: float = 2.0):
    callback.run.clock.samples = samples
    callback.before_step(Step(1, [], loops, size, length))
    return callback.accept(loss, 1.0)


@pytest.mark.parametrize(
    ("samples", "size", "stages"), [(0, 4, (0, 0)), (8, 4, (0, 0)), (8, 8, (0, 1)), (12, 4, (1, 1)), (10**6, 4, (1, 1))]
)
def test_a_step_is_of_the_stages_of_its_samples(run, samples, size, stages):
    callback = Incidents(run)
    assert judge(callback, samples, size, length=16, loops=3)
    assert callback.guard.kind == StepKind(*stages, 16, 3, size)


def test_loops_that_another_callback_has_changed_are_those_of_the_step(run):
    callback, step = Incidents(run), Step(1, [], 2, 4, 32)
    callback.before_step(step)
    step.loop_count = 1
    callback.accept(2.0, 1.0)
    assert callback.guard.kind.loop_count == 1


@pytest.mark.parametrize(
    ("change", "action"),
    [
        (lambda run: None, "fail"),
        (lambda run: setattr(run.config, "name", "other"), "fail"),
        (lambda run: setattr(run.config.parallel, "tensor_model_parallel_size", 2), "fail"),
        (lambda run: setattr(run.config.training, "micro_batch_size", 2), "fail"),
        (lambda run: setattr(run.config.data, "tokenizer", "elsewhere/tokenizer.json"), "fail"),
        (lambda run: setattr(run.config.training.spikes, "threshold", 5.0), "rollback"),
        (lambda run: setattr(run.config, "optimizer", OptimizerConfig(lr=1e-5)), "rollback"),
        (lambda run: setattr(run.config.data, "length_schedule", [LengthStage(400, 16)]), "rollback"),
    ],
    ids=["nothing", "name", "layout", "micro batch", "path", "threshold", "rate", "length"],
)
def test_bad_steps_are_counted_anew_once_something_that_makes_them_has_changed(run, change, action):
    stopped = Incidents(run)
    for loss in (2.0, 2.1, 1.9, 50.0):
        judge(stopped, 0, loss=loss)
    assert stopped.guard.action == "rollback"
    change(run)
    resumed = Incidents(run)
    resumed.load_state_dict(stopped.state_dict())
    assert not judge(resumed, 0, loss=50.0), "the losses are remembered in any case"
    assert resumed.guard.action == action and resumed.guard.too_many is (action == "fail")


@pytest.mark.parametrize("rolled_back", [False, True])
def test_losses_on_other_data_judge_no_step(run, rolled_back):
    """As of a decay branch on another mix, with checkpoint.allow_other_data; bad steps are counted anew too."""
    trunk = Incidents(run)
    for loss in (2.0, 2.1, 1.9, 50.0):
        judge(trunk, 0, loss=loss)
    state = trunk.state_dict()
    run.data.fingerprint |= {"sha256": "1", "sampling": {"num_samples": 9}}
    longer = Incidents(run)
    longer.load_state_dict(state)
    assert not judge(longer, 0, loss=50.0) and longer.guard.too_many
    run.data.fingerprint |= {"sources": {"train": [["math", 1.0]]}}
    branch = Incidents(run)
    (branch.on_rollback if rolled_back else branch.load_state_dict)(state)
    assert judge(branch, 0, loss=50.0)
    for loss in (50.1, 49.9):
        judge(branch, 0, loss=loss)
    assert not judge(branch, 0, loss=90.0) and branch.guard.action == "rollback"


def test_a_rollback_restores_the_losses_alone(run):
    callback = Incidents(run)
    for loss in (5.0, 5.1, 4.9):
        judge(callback, 0, loss=loss)
    state = callback.state_dict()
    for loss in (*[2.0, 2.1, 1.9] * 3, 6.0):
        judge(callback, 0, loss=loss)
    callback.on_rollback(state)
    assert judge(callback, 0, loss=5.0)
    assert not judge(callback, 0, loss=9.0) and callback.guard.too_many


def test_from_a_checkpoint_without_a_state_it_goes_on_without_losses(run):
    callback = Incidents(run)
    for loss in (2.0, 2.1, 1.9):
        judge(callback, 0, loss=loss)
    callback.on_rollback({})
    assert judge(callback, 0, loss=9.0)
