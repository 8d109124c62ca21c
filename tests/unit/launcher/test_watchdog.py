"""The watchdog alone: several ranks' watchdogs in one process, over one store."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch.distributed  # noqa: F401  (as in a rank: its first import would take longer than the limits here)

from plt_megatron.launcher.watchdog import Watchdog


class Memory:
    """A store as torch's, in memory."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.answers = True

    def set(self, key: str, value: str) -> None:
        self._check()
        self.values[key] = value

    def get(self, key: str) -> bytes:
        self._check()
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        self._check()
        return all(key in self.values for key in keys)

    def _check(self) -> None:
        if not self.answers:
            raise RuntimeError("connection reset\nby whom it does not say")


class Ranks:
    """Watchdogs of `count` ranks whose exits are recorded instead of carried out."""

    def __init__(self, folder: Path, count: int, patience: float = 0.3, slow: float = 60.0) -> None:
        self.store = Memory()
        self.ended = [threading.Event() for _ in range(count)]
        self.watchdogs = [
            Watchdog(
                folder,
                self.store,
                rank,
                count,
                patience=patience,
                slow_patience=slow,
                interval=0.02,
                end=lambda status, rank=rank: self.ended[rank].set(),
            )
            for rank in range(count)
        ]

    def beat(self, phase: str, step: int, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.watchdogs)) if ranks is None else ranks:
            self.watchdogs[rank].beat(phase, step)

    def start(self, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.watchdogs)) if ranks is None else ranks:
            self.watchdogs[rank].start()

    def close(self) -> None:
        for watchdog in self.watchdogs:
            watchdog.close()


@pytest.fixture
def ranks(tmp_path):
    made = []

    def make(count: int, **options: float) -> Ranks:
        made.append(Ranks(tmp_path, count, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def settle(ranks: Ranks) -> None:
    ranks.beat("training", 0)
    ranks.beat("training", 1)


def test_a_run_that_moves_is_left_alone(ranks):
    job = ranks(2, patience=0.5)
    settle(job)
    job.start()
    until = time.monotonic() + 1.2
    step = 1
    while time.monotonic() < until:
        step += 1
        job.beat("training", step)
        threading.Event().wait(0.05)
    assert not any(event.is_set() for event in job.ended)


def test_all_ranks_end_when_one_stops(ranks, capsys, tmp_path):
    job = ranks(3)
    settle(job)
    job.start([0, 2])  # rank 1's process is frozen: its thread says nothing
    job.store.set("watchdog/1", '{"count": 1, "rank": 1, "host": "n1", "step": 1, "phase": "training", '
                  '"quiet_for": 0, "waits_in": null, "at": "x"}')  # fmt: skip
    assert job.ended[0].wait(10) and job.ended[2].wait(10)
    error = capsys.readouterr().err
    assert "no sign of life from rank 1 on n1" in error and error.count("error: ") == 1
    assert "test_watchdog" in (tmp_path / "incidents" / "hang_rank_0002.txt").read_text()


def test_a_rank_that_never_gave_a_sign_is_named(ranks, capsys):
    job = ranks(2)
    settle(job)
    job.start([0])
    assert job.ended[0].wait(10)
    assert "no sign of life from rank 1" in capsys.readouterr().err


def test_rank_0_is_watched_by_the_others(ranks, capsys):
    job = ranks(3)
    settle(job)
    job.start([1, 2])
    assert job.ended[1].wait(10) and job.ended[2].wait(10)
    assert "rank 0 has given no sign" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_rank_0_gone(ranks, capsys):
    job = ranks(2)
    settle(job)
    job.store.answers = False
    job.start([1])
    assert job.ended[1].wait(10)
    assert "rank 0, which holds the job's store, does not answer (connection reset)" in capsys.readouterr().err


@pytest.mark.parametrize("phase", ["starting", "saving", "loading"])
def test_slow_phases_have_the_long_limit(ranks, phase):
    job = ranks(1, patience=0.05, slow=50.0)
    settle(job)
    if phase != "starting":
        job.beat(phase, 2)
        assert job.watchdogs[0].limit() == 50.0
    else:
        assert ranks(1, patience=0.05, slow=50.0).watchdogs[0].limit() == 50.0


def test_the_limit_is_long_until_the_first_step_is_done_after_a_resume_too(ranks):
    (watchdog,) = ranks(1, patience=1.0, slow=50.0).watchdogs
    watchdog.beat("training", 700)
    watchdog.beat("training", 700)
    assert watchdog.limit() == 50.0
    watchdog.beat("training", 701)
    assert watchdog.limit() == 1.0


def test_a_slow_machine_is_no_hung_one(ranks):
    job = ranks(1, patience=2.0, slow=50.0)
    (watchdog,) = job.watchdogs
    settle(job)
    begun = watchdog._seconds
    job.start()
    while watchdog._seconds < begun + 0.6:  # as the watchdog counts: a busy machine wakes it late
        threading.Event().wait(0.01)
    watchdog.beat("training", 2)
    assert 2.0 < watchdog.limit() < 50.0
    assert not job.ended[0].is_set()


def test_a_store_that_blocks_its_callers_is_rank_0_gone(ranks, capsys):
    job = ranks(2)
    settle(job)
    job.store.set = lambda key, value: threading.Event().wait(20)
    job.start([1])
    assert job.ended[1].wait(10)
    assert "rank 0, which holds the job's store, does not answer" in capsys.readouterr().err


def test_a_process_alone_says_where_it_hangs(ranks, capsys):
    job = ranks(1)
    settle(job)
    job.start()
    assert job.ended[0].wait(10)
    assert "rank 0 on " in capsys.readouterr().err


def test_turns_are_phases_steps_and_the_first_microbatch_of_each(ranks):
    """Ranks of a pipeline run their microbatches in different orders; what is counted is the same on all."""
    turns = []
    for microbatches in (1, 5):
        (watchdog,) = ranks(1).watchdogs
        for phase, step in [("loading", 0), ("training", 0), ("training", 1), ("validating", 2), ("training", 2)]:
            watchdog.beat(phase, step)
            turns.append(watchdog._turn)
            for _ in range(microbatches):
                watchdog.beat(phase, step)
            turns.append(watchdog._turn)
    assert turns[:10] == turns[10:] == sorted(set(turns))
