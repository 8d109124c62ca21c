"""Where a step's time goes."""

from __future__ import annotations

import pytest

from plt_megatron.train import engine
from plt_megatron.train.engine import StepTimes


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
