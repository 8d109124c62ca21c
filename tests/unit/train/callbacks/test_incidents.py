"""What the guard is told of a step; what is done about bad ones is tried in tests/distributed."""

from __future__ import annotations

import pytest

from plt_megatron.config.schema import DataConfig, DataStage, OptimizerConfig, SpikeConfig, TrainingConfig
from plt_megatron.train.callbacks.base import Step
from plt_megatron.train.callbacks.incidents import Incidents
from plt_megatron.train.guard import StepKind
from tests.unit.train.callbacks.a_run import a_run


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
        (lambda config: None, "fail"),
        (lambda config: setattr(config, "name", "other"), "fail"),
        (lambda config: setattr(config.parallel, "tensor_model_parallel_size", 2), "fail"),
        (lambda config: setattr(config.training.spikes, "threshold", 5.0), "rollback"),
        (lambda config: setattr(config, "optimizer", OptimizerConfig(lr=1e-5)), "rollback"),
        (lambda config: setattr(config.data, "split", "1,0,0"), "rollback"),
    ],
    ids=["nothing", "name", "layout", "threshold", "rate", "data"],
)
def test_bad_steps_are_counted_anew_once_something_that_makes_them_has_changed(run, change, action):
    stopped = Incidents(run)
    for loss in (2.0, 2.1, 1.9, 50.0):
        judge(stopped, 0, loss=loss)
    assert stopped.guard.action == "rollback"
    change(run.config)
    resumed = Incidents(run)
    resumed.load_state_dict(stopped.state_dict())
    assert not judge(resumed, 0, loss=50.0), "the losses are remembered in any case"
    assert resumed.guard.action == action and resumed.guard.too_many is (action == "fail")


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
