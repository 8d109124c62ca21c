"""Requests to stop: none is lost, whenever its signal arrives."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.trainer import StopRequest


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


def test_saving_is_asked_for_once_and_stopping_for_good(request_of_one_rank, tmp_path):
    (tmp_path / "SAVE").touch()
    assert request_of_one_rank.agree() and not request_of_one_rank.requested
    assert not request_of_one_rank.agree()
    (tmp_path / "STOP").touch()
    assert request_of_one_rank.agree() and request_of_one_rank.requested
    assert not (tmp_path / "STOP").exists()
    assert not request_of_one_rank.agree() and request_of_one_rank.requested  # while it waits for exports
