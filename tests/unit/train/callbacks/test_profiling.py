"""Traces of chosen steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from plt_megatron.config.schema import ProfileConfig
from plt_megatron.train.callbacks.base import Step
from plt_megatron.train.callbacks.performance import Profiling
from tests.unit.train.callbacks.a_run import a_run


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch):
    """Make this process a rank of a job."""
    return lambda number: monkeypatch.setattr("torch.distributed.get_rank", lambda: number)


def steps_in(trace: Path) -> list[str]:
    names = [str(event.get("name")) for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    return sorted(name for name in names if name.startswith("step "))


def test_a_trace_holds_the_chosen_steps_alone(tmp_path, rank):
    rank(1)
    run = a_run(tmp_path, profile=ProfileConfig(4, 2, [1]))
    profiling, written = Profiling(run), []
    for number in range(1, 7):
        profiling.before_step(Step(number, [], 1, 1, 1))
        written.append(list(run.said))
        with torch.profiler.record_function(f"step {number}"):
            torch.ones(3).sum()
    path = tmp_path / "profile" / "rank_0001_steps_3-4.json.gz"
    line = f"wrote profiler trace {path}"
    assert written == [[], [], [], [], [line], [line]]
    assert steps_in(path) == ["step 3", "step 4"] and b"aten::sum" in gzip.decompress(path.read_bytes())


@pytest.mark.parametrize("back_to", [0, 3])
def test_a_rollback_to_before_its_steps_begins_the_trace_anew(tmp_path, rank, back_to):
    rank(0)
    run = a_run(tmp_path, profile=ProfileConfig(4, 2))
    profiling = Profiling(run)
    for number in (2, 3, *range(back_to + 1, 6)):
        if number == back_to + 1:
            run.clock.step = back_to
            profiling.on_rollback({})
        profiling.before_step(Step(number, [], 1, 1, 1))
        with torch.profiler.record_function(f"step {number}"):
            torch.ones(3).sum()
    assert steps_in(tmp_path / "profile" / "rank_0000_steps_3-4.json.gz") == ["step 3", "step 4"]


def test_a_rollback_to_before_the_step_it_resumed_at_begins_the_trace_anew(tmp_path, rank):
    rank(0)
    run = a_run(tmp_path, profile=ProfileConfig(6, 2))
    profiling = Profiling(run)
    for number in (5, 6, 4, 5, 6, 7):
        if number == 4:
            run.clock.step = 3
            profiling.on_rollback({})
        profiling.before_step(Step(number, [], 1, 1, 1))
        with torch.profiler.record_function(f"step {number}"):
            torch.ones(3).sum()
    assert steps_in(tmp_path / "profile" / "rank_0000_steps_4-6.json.gz") == ["step 4", "step 5", "step 6"]


def test_a_trace_is_named_by_all_its_steps(tmp_path, rank):
    rank(0)
    run = a_run(tmp_path, profile=ProfileConfig(9, 2))
    profiling = Profiling(run)
    for number in (3, 4, 5, 4):
        if number == 4:
            run.clock.step = 3
            profiling.on_rollback({})
        profiling.before_step(Step(number, [], 1, 1, 1))
    profiling.on_end()
    assert (tmp_path / "profile" / "rank_0000_steps_3-5.json.gz").is_file()


def test_a_run_that_ends_early_leaves_what_was_traced(tmp_path, rank):
    rank(0)
    run = a_run(tmp_path, profile=ProfileConfig(9))
    profiling = Profiling(run)
    profiling.before_step(Step(1, [], 1, 1, 1))
    torch.ones(3).sum()
    for _ in range(2):
        profiling.on_end()
        profiling.before_step(Step(2, [], 1, 1, 1))
    assert len(run.said) == 1
    resumed = Profiling(run)
    for number in (2, 3):
        resumed.before_step(Step(number, [], 1, 1, 1))
    resumed.on_end()
    traces = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert traces == ["rank_0000_steps_1-1.json.gz", "rank_0000_steps_2-3.json.gz"]


@pytest.mark.parametrize("logging", [{}, {"profile": ProfileConfig(3, ranks=[1])}], ids=["no steps", "rank 1"])
def test_no_trace_is_made_unasked(tmp_path, rank, logging):
    rank(0)
    run = a_run(tmp_path, **logging)
    profiling = Profiling(run)
    for number in range(1, 6):
        profiling.before_step(Step(number, [], 1, 1, 1))
    profiling.on_end()
    assert not run.said and not (tmp_path / "profile").exists()
