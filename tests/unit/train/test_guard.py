"""Which steps are accepted, and what happens to the others."""

from __future__ import annotations

import json
import math
from typing import Literal

import pytest

from plt_megatron.config.schema import SpikeConfig, TrainingConfig
from plt_megatron.train.guard import StepGuard, StepKind


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


def test_a_spike_needs_losses_to_compare_with():
    judge = guard(on_spike="skip")
    assert judge.accept(2.0, 1.0) and judge.accept(90.0, 1.0)


LOWER, HIGHER = [2.0, 2.1, 1.9, 2.05, 1.95], [5.0, 5.1, 4.9, 5.05, 4.95]


@pytest.mark.parametrize(
    "then",
    [
        StepKind(1, 1, 64, 2, 8),
        StepKind(0, 1, 64, 2, 8),
        StepKind(0, 0, 128, 2, 8),
        StepKind(0, 0, 64, 3, 8),
        StepKind(0, 0, 64, 2, 4),
    ],
    ids=["data", "data of both", "length", "loops", "smaller batch"],
)
def test_after_a_planned_change_losses_from_before_are_no_measure(then):
    judge = guard(on_spike="rollback")
    judge.kind = StepKind(0, 0, 64, 2, 8)
    assert all(judge.accept(loss, 1.0) for loss in LOWER)
    judge.kind = then
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


def test_a_resumed_guard_judges_as_one_that_never_stopped():
    judge, resumed = guard(on_spike="skip", max_skipped_steps=1), guard(on_spike="skip", max_skipped_steps=1)
    resumed.kind = judge.kind = StepKind(0, 0, 64, 2, 8)
    for loss in (2.0, 2.1, math.nan, 1.9):
        judge.accept(loss, 1.0)
    resumed.restore(json.loads(json.dumps(judge.state())))
    for loss in (2.0, 9.0, 2.0):
        assert judge.accept(loss, 1.0) == resumed.accept(loss, 1.0)
        assert (judge.problem, judge.action) == (resumed.problem, resumed.action)
