"""Which steps are accepted, and what happens to the others."""

from __future__ import annotations

import json
import math

import pytest

from plt_megatron.config.schema import TrainingConfig
from plt_megatron.train.guard import StepGuard


def guard(**settings) -> StepGuard:
    return StepGuard(TrainingConfig(spike_window=8, **settings))


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
    judge = guard(on_spike="skip", spike_threshold=4.0)
    assert all(judge.accept(loss, 1.0) for loss in losses)
    assert not judge.accept(5.0, 1.0)
    assert "spike" in judge.problem and judge.action == "skip"
    assert judge.accept(0.5, 1.0), "a fall is no spike"


def test_a_spike_needs_losses_to_compare_with():
    judge = guard(on_spike="skip")
    assert judge.accept(2.0, 1.0) and judge.accept(90.0, 1.0)


def test_too_many_in_a_row_end_the_run():
    judge = guard(max_skipped_steps=2)
    actions = []
    for _ in range(3):
        assert not judge.accept(math.nan, 1.0)
        actions.append(judge.action)
    assert actions == ["skip", "skip", "fail"]


def test_too_many_altogether_end_the_run():
    judge = guard(max_skipped_steps=2)
    for _ in range(2):
        assert not judge.accept(math.nan, 1.0)
        assert judge.accept(2.0, 1.0)
    assert not judge.accept(math.nan, 1.0)
    assert judge.action == "fail"


def test_old_skips_are_forgiven():
    judge = guard(max_skipped_steps=1)
    for _ in range(3):
        assert not judge.accept(math.nan, 1.0)
        assert judge.action == "skip"
        assert all(judge.accept(2.0, 1.0) for _ in range(1000))


def test_a_resumed_guard_judges_as_one_that_never_stopped():
    judge, resumed = guard(on_spike="skip", max_skipped_steps=1), guard(on_spike="skip", max_skipped_steps=1)
    for loss in (2.0, 2.1, math.nan, 1.9):
        judge.accept(loss, 1.0)
    resumed.restore(json.loads(json.dumps(judge.state())))
    for loss in (2.0, 9.0, 2.0):
        assert judge.accept(loss, 1.0) == resumed.accept(loss, 1.0)
        assert (judge.problem, judge.action) == (resumed.problem, resumed.action)
