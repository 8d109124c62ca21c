"""Requests to stop: none is lost, whenever its signal arrives. And how long a step takes."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
import torch.distributed as dist

from plt_megatron.config.schema import RunConfig
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.checkpoint import store
from plt_megatron.train.trainer import StopRequest, Trainer


@pytest.fixture
def request_of_one_rank(tmp_path, monkeypatch):
    """A `StopRequest` of a job of one rank."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda flag, op: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    request = StopRequest(RunFolder(tmp_path))
    yield request
    request.close()


def test_a_signal_during_the_collective_counts_at_the_next_step(request_of_one_rank, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda flag, op: os.kill(os.getpid(), signal.SIGTERM))
    assert not request_of_one_rank.agree()
    monkeypatch.setattr(dist, "all_reduce", lambda flag, op: None)
    assert request_of_one_rank.agree() and request_of_one_rank.requested


@pytest.mark.parametrize("former", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_closed_terminal_asks_to_stop_unless_under_nohup(tmp_path, monkeypatch, former):
    monkeypatch.setattr(signal, "signal", heard := Mock())
    monkeypatch.setattr(signal, "getsignal", lambda number: former)
    request = StopRequest(RunFolder(tmp_path))
    heard.assert_any_call(signal.SIGTERM, request._hear)
    assert (call(signal.SIGHUP, request._hear) in heard.mock_calls) == (former is signal.SIG_DFL)


def at_a_step(**parts: object) -> Mock:
    """A run before a step at which nothing is due."""
    run = Mock(spec=Trainer, engine=Mock(), checkpoints=Mock(), **parts)
    run._next_step.return_value, run.is_due.return_value = SimpleNamespace(batches=[], loop_count=1), False
    return run


def test_a_steps_seconds_are_those_of_the_device(monkeypatch):
    """Its update's kernels are launched when `train_step` returns, and still run."""
    still_running, seen = threading.Event(), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: still_running.wait(10))
    threading.Timer(0.2, still_running.set).start()
    run = at_a_step(config=Mock(), stop=Mock(agree=lambda: False))
    run._each.side_effect = lambda hook, step, *_: seen.append(getattr(step, "seconds", None)) or []
    Trainer._train_step(run)
    assert seen[-1] >= 0.15


@pytest.mark.parametrize(("enabled", "asked"), [(False, True), (False, False), (True, True)])
def test_a_run_without_checkpoints_says_that_nothing_is_saved(enabled, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run = at_a_step(config=Mock(checkpoint=Mock(enabled=enabled)), stop=Mock(agree=lambda: asked))
    Trainer._train_step(run)
    warnings = [call.args[0] for call in run.say.call_args_list]
    assert ["checkpoint.enabled=false" in warning for warning in warnings] == [True] * (asked and not enabled)


@pytest.mark.parametrize("started_before", [False, True])
def test_a_run_that_another_launcher_starts_has_its_configuration_too(started_before, tmp_path):
    """Other commands know a run by it."""
    config = RunConfig(name="run", output_dir=str(tmp_path))
    folder = RunFolder.of(config)
    if started_before:
        folder.save_config(RunConfig(name="before"))
    parts = {name: Mock() for name in ("clock", "data", "checkpoints", "stop")}
    run = Mock(spec=Trainer, folder=folder, config=config, is_first_rank=True, is_finished=True, **parts)
    Trainer.run(run)
    assert folder.config() == (RunConfig(name="before") if started_before else config)


def test_asked_for_both_a_run_stops_and_leaves_neither_file_to_the_next_job(request_of_one_rank, tmp_path):
    for name in ("SAVE", "STOP"):
        (tmp_path / name).touch()
    assert request_of_one_rank.agree() and request_of_one_rank.requested and not list(tmp_path.iterdir())


def test_saving_is_asked_for_once_and_stopping_for_good(request_of_one_rank, tmp_path):
    (tmp_path / "SAVE").touch()
    assert request_of_one_rank.agree() and not request_of_one_rank.requested
    assert not request_of_one_rank.agree()
    (tmp_path / "STOP").touch()
    assert request_of_one_rank.agree() and request_of_one_rank.requested
    assert not (tmp_path / "STOP").exists()
    assert not request_of_one_rank.agree() and request_of_one_rank.requested  # while it waits for exports


@pytest.mark.parametrize(("by_file", "saves"), [(False, True), (True, True), (True, False)])
def test_a_run_says_that_a_file_has_stopped_it(by_file, saves, request_of_one_rank, tmp_path):
    """It may have been left there long before, and the run would end after its first step without a word."""
    if by_file:
        (tmp_path / "STOP").touch()
    else:
        os.kill(os.getpid(), signal.SIGTERM)
    assert request_of_one_rank.agree()
    folder = RunFolder(tmp_path)
    parts = {"data": Mock(), "checkpoints": Mock(), "clock": Mock()}
    parts["config"] = Mock(checkpoint=Mock(enabled=saves))
    run = Mock(spec=Trainer, folder=folder, is_first_rank=False, is_finished=False, stop=request_of_one_rank, **parts)
    assert not Trainer.run(run)
    said = [call.args[0] for call in run.say.call_args_list]
    assert [str(folder.stop_file) in each for each in said] == [True] * by_file
    assert ["the run continues" in each for each in said] == [saves] * by_file


@pytest.mark.parametrize("writing", [False, True])
def test_a_save_in_the_background_is_published_as_saving(writing, tmp_path, monkeypatch):
    """The watchdog gives that phase its own time: `poll` says so before it publishes, and not while parts are
    written."""
    monkeypatch.setattr(store, "any_rank", lambda state: state)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    done = []
    saves = store.CheckpointStore(tmp_path / "checkpoints", RunConfig(), {}, beat=done.append)
    publish = Mock(side_effect=lambda *_: done.append("published") or tmp_path)
    saves._pending = Mock(publish=publish), Mock(is_alive=lambda: writing)
    assert saves.poll() == (None if writing else tmp_path)
    assert done == ([] if writing else ["saving", "published"])
