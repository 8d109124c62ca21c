"""Requests to stop: none is lost, whenever its signal arrives. And how long a step takes."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from plt_megatron.run_folder.folder import RunFolder
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


def test_a_steps_seconds_are_those_of_the_device(monkeypatch):
    """Its update's kernels are launched when `train_step` returns, and still run."""
    still_running, seen = threading.Event(), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: still_running.wait(10))
    threading.Timer(0.2, still_running.set).start()
    run = Mock(spec=Trainer, engine=Mock(), checkpoints=Mock(), config=Mock(), stop=Mock(agree=lambda: False))
    run._next_step.return_value, run.is_due.return_value = SimpleNamespace(batches=[], loop_count=1), False
    run._each.side_effect = lambda hook, step, *_: seen.append(getattr(step, "seconds", None)) or []
    Trainer._train_step(run)
    assert seen[-1] >= 0.15


def test_saving_is_asked_for_once_and_stopping_for_good(request_of_one_rank, tmp_path):
    (tmp_path / "SAVE").touch()
    assert request_of_one_rank.agree() and not request_of_one_rank.requested
    assert not request_of_one_rank.agree()
    (tmp_path / "STOP").touch()
    assert request_of_one_rank.agree() and request_of_one_rank.requested
    assert not (tmp_path / "STOP").exists()
    assert not request_of_one_rank.agree() and request_of_one_rank.requested  # while it waits for exports
