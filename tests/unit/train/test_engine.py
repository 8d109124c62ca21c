"""Where a step's time goes, and clipping where a rank owns no parameter that is trained."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from plt_megatron.config.schema import RunConfig
from plt_megatron.train import engine, megatron_engine
from plt_megatron.train.engine import StepTimes
from plt_megatron.train.megatron_engine import MegatronEngine


def test_times_are_means_over_the_steps_since_they_were_taken(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(engine.time, "perf_counter", lambda: next(clock))
    times = StepTimes()
    for _ in range(2):
        with times.measure("data"):
            pass
        times.count_step()
    assert times.take() == {"data": pytest.approx(2.0)}
    with times.measure("checkpoint"):  # after the last log line: counts for the next
        pass
    times.count_step()
    assert times.take() == {"checkpoint": pytest.approx(0.5)}
    assert times.take() == {}


def test_a_block_that_fails_is_timed_too():
    times = StepTimes()
    with pytest.raises(KeyError), times.measure("data"):
        raise KeyError
    assert "data" in times.take()


def test_a_rank_without_parameters_calls_no_kernel(monkeypatch):
    """Transformer Engine's reads the first tensor of its list."""
    clipped: list[list[str]] = []
    monkeypatch.setattr(megatron_engine, "clip_grad_by_total_norm_fp32", lambda found, *_: clipped.append(found))
    parts = [Mock(get_parameters=list), Mock(get_parameters=lambda: ["weight"])]
    monkeypatch.setattr(megatron_engine, "distributed_parts", lambda optimizer: parts)
    MegatronEngine._clip(Mock(config=RunConfig()), 5.0)
    assert clipped == [["weight"]]
