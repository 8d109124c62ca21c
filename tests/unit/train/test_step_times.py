"""Where a step's time goes, and traces of chosen steps."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from plt_megatron.config.schema import LoggingConfig
from plt_megatron.train import step_times
from plt_megatron.train.step_times import StepProfiler, StepTimes


def test_times_are_means_over_the_steps_since_they_were_taken(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: next(clock))
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


def test_a_trace_holds_the_chosen_steps_alone(tmp_path):
    logging = LoggingConfig(profile_step_start=2, profile_step_end=4, profile_ranks=[1])
    profiler = StepProfiler(logging, tmp_path, rank=1)
    written = []
    for step in range(6):
        written.append(profiler.at_step(step))
        with torch.profiler.record_function(f"step {step + 1}"):
            torch.ones(3).sum()
    path = tmp_path / "profile" / "rank_0001_steps_3-4.json.gz"
    assert written == [None, None, None, None, path, None]
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {name for name in names if str(name).startswith("step ")} == {"step 3", "step 4"}
    assert "aten::sum" in names


def test_a_run_that_ends_early_leaves_what_was_traced(tmp_path):
    profiler = StepProfiler(LoggingConfig(profile_step_start=0, profile_step_end=9), tmp_path, rank=0)
    assert profiler.at_step(0) is None
    torch.ones(3).sum()
    path = profiler.close()
    assert path is not None and path.is_file()
    assert profiler.at_step(1) is None and profiler.close() is None


@pytest.mark.parametrize(
    ("logging", "rank"), [(LoggingConfig(), 0), (LoggingConfig(profile_step_end=3, profile_ranks=[1]), 0)]
)
def test_no_trace_is_made_unasked(tmp_path, logging, rank):
    profiler = StepProfiler(logging, tmp_path, rank)
    assert [profiler.at_step(step) for step in range(5)] == [None] * 5
    assert not (tmp_path / "profile").exists()
