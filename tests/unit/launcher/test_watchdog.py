"""Which rank is named when a job hangs, and when it is ended."""

from __future__ import annotations

import threading
import time
import traceback
from pathlib import Path

import pytest

from plt_megatron.launcher.watchdog import Sign, Watchdog, collective, describe_hang, position, ranks_behind


def sign(rank: int, waits_in: str | None = None, at: str = "engine.py", turn: int = 9, **collectives: int) -> Sign:
    return Sign(rank, f"n{rank}", 9, 4, "training", 30.0, waits_in, f"{at}:{rank}", turn, collectives)


def eight(**stuck: str) -> list[Sign]:
    """Eight ranks under NCCL, tensor parallel in pairs and data parallel over the pairs, which have run ahead to where
    the host needs a value: in no collective. `rank_N="data"` is stuck before its step began, `rank_N="forward"` in it.
    """
    signs = []
    for rank in range(8):
        tensor, data, where = f"tensor{rank // 2}", f"data{rank % 2}", stuck.get(f"rank_{rank}")
        peer = stuck.get(f"rank_{rank ^ 1}")
        if where == "data":
            signs.append(sign(rank, at="sampling.py", turn=8, **{tensor: 100, data: 20}))
        elif where == "forward":
            signs.append(sign(rank, at="attention.py", **{tensor: 103, data: 20}))
        elif peer is not None:  # its first collective that the peer has not started
            signs.append(sign(rank, at="router.py", **{tensor: 101 if peer == "data" else 104, data: 20}))
        else:
            signs.append(sign(rank, at="optimizer.py", **{tensor: 140, data: 21}))
    return signs


def test_a_rank_stuck_in_its_data_is_named_where_collectives_return_at_once():
    text = describe_hang(eight(rank_5="data"))
    assert text == "step 5 has not moved for 30 s: the others wait for rank 5 on n5, training, at sampling.py:5"


BEHIND = {
    "in the middle of a step": (eight(rank_2="forward"), 2, "attention.py"),
    # NCCL's barrier keeps its caller; rank 1 waits for a value on its GPU, rank 2 is the one that both wait for.
    "outside a barrier": ([sign(0, "barrier", world=8), sign(1, world=8), sign(2, world=7)], 2, "engine.py"),
    "outside the collective": ([sign(0, "all_reduce"), sign(1), sign(2, "all_reduce")], 1, "engine.py"),
    # gloo: a later stage waits for its first input, while the first one is stuck in its first microbatch.
    "in the first stage": ([sign(0, turn=9), sign(1, "recv", turn=8)], 0, "engine.py"),
}


@pytest.mark.parametrize(("signs", "rank", "where"), BEHIND.values(), ids=BEHIND)
def test_so_is_any_other_rank_that_the_others_wait_for(signs, rank, where):
    said = f"step 5 has not moved for 30 s: the others wait for rank {rank} on n{rank}, training, at {where}:{rank}"
    assert describe_hang(signs) == said


def test_two_ranks_behind_are_both_named():
    assert [found.rank for found in ranks_behind(eight(rank_2="data", rank_5="data"))] == [2, 5]
    text = describe_hang(eight(rank_2="data", rank_5="forward"))
    assert "wait for rank 2 on n2, training, at sampling.py:2; rank 5 on n5, training, at attention.py:5" in text


def test_nobody_is_named_where_all_are_equally_far_and_all_are_shown():
    text = describe_hang(eight())
    assert "no rank is behind the others: rank 0 on n0, training, at optimizer.py:0; rank 1" in text
    assert "rank 7 on n7" in text and "wait" not in text


def test_a_long_list_of_ranks_is_cut():
    assert describe_hang([sign(rank) for rank in range(64)]).endswith("at engine.py:7; and 56 more")


def test_ranks_that_wait_for_one_another_are_not_behind():
    """Two collectives in another order."""
    crossed = [sign(0, a=5, b=7), sign(1, a=6, b=6)]
    assert ranks_behind(crossed) == [] and "no rank is behind" in describe_hang(crossed)


def test_collectives_that_do_not_match_are_all_shown():
    text = describe_hang([sign(0, "all_reduce"), sign(1, "barrier")])
    assert "all ranks wait in collectives" in text and "rank 0 on n0, training, in all_reduce at" in text
    assert "rank 1 on n1, training, in barrier" in text


def test_a_stack_tells_its_collective_and_our_innermost_line():
    frames = [
        traceback.FrameSummary("/x/plt_megatron/train/megatron_engine.py", 10, "_run", line="self._reduce()"),
        traceback.FrameSummary("/x/plt_megatron/train/megatron_engine.py", 20, "_reduce", line="dist.all_reduce(t)"),
        traceback.FrameSummary("/y/torch/distributed/distributed_c10d.py", 5, "all_reduce", line="work.wait()"),
    ]
    assert collective(frames) == "all_reduce"
    assert position(frames) == "megatron_engine.py:20 _reduce (in all_reduce)"
    assert collective(frames[:2]) is None
    assert position([]) == "an unknown place"


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

    def __init__(self, folder: Path, count: int, patience: float = 1.0, slow: float = 60.0, index: float = 0.0) -> None:
        self.store = Memory()
        self.ended = [threading.Event() for _ in range(count)]
        limits = {"patience": patience, "slow_patience": slow, "index_patience": index, "interval": 0.02}
        self.watchdogs = [
            Watchdog(folder, self.store, rank, count, **limits, end=lambda _, rank=rank: self.ended[rank].set())
            for rank in range(count)
        ]

    def beat(self, phase: str, step: int) -> None:
        for watchdog in self.watchdogs:
            watchdog.beat(phase, step)

    def start(self, *ranks: int) -> None:
        """The watchdogs of these, or of all."""
        for rank in ranks or range(len(self.watchdogs)):
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


def settled(ranks: Ranks) -> Ranks:
    """Ranks that have taken their first step."""
    ranks.beat("training", 0)
    ranks.beat("training", 1)
    return ranks


def test_a_run_that_moves_is_left_alone(ranks):
    job = settled(ranks(2, patience=1.5))
    job.start()
    until = time.monotonic() + 2.0
    step = 1
    while time.monotonic() < until:
        step += 1
        job.beat("training", step)
        threading.Event().wait(0.05)
    assert not any(event.is_set() for event in job.ended)


def test_all_ranks_end_when_one_stops(ranks, capsys, tmp_path):
    job = settled(ranks(3))
    job.start(0, 2)  # rank 1's process is frozen: its thread says nothing
    job.store.set("watchdog/1", '{"count": 1, "rank": 1, "host": "n1", "step": 1, "phase": "training", '
                  '"quiet_for": 0, "waits_in": null, "at": "x"}')  # fmt: skip
    assert job.ended[0].wait(10) and job.ended[2].wait(10)
    error = capsys.readouterr().err
    assert "no sign of life from rank 1 on n1" in error and error.count("error: ") == 1
    assert "test_watchdog" in (tmp_path / "incidents" / "hang_rank_0002.txt").read_text()


@pytest.mark.parametrize(("count", "named"), [(2, "no sign of life from rank 1"), (1, "rank 0 on ")])
def test_a_rank_that_never_gave_a_sign_is_named_and_one_alone_itself(ranks, capsys, count, named):
    job = settled(ranks(count))
    job.start(0)
    assert job.ended[0].wait(10)
    assert named in capsys.readouterr().err


def test_rank_0_is_watched_by_the_others(ranks, capsys):
    job = settled(ranks(3))
    job.start(1, 2)
    assert job.ended[1].wait(10) and job.ended[2].wait(10)
    assert "rank 0 has given no sign" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", [False, True])
def test_a_store_that_does_not_answer_is_rank_0_gone(ranks, capsys, blocks):
    job = settled(ranks(2))
    if blocks:
        job.store.set = lambda key, value: threading.Event().wait(20)
    job.store.answers = blocks
    job.start(1)
    assert job.ended[1].wait(10)
    why = "" if blocks else " (connection reset)"
    assert f"rank 0, which holds the job's store, does not answer{why}" in capsys.readouterr().err


@pytest.mark.parametrize("phase", ["starting", "saving", "loading"])
def test_slow_phases_have_the_long_limit(ranks, phase):
    job = ranks(1, patience=0.05, slow=50.0)
    if phase != "starting":
        settled(job).beat(phase, 2)
    assert job.watchdogs[0].limit() == 50.0


@pytest.mark.parametrize("phases", [["training"], ["indexing", "starting", "loading"]])
def test_the_limit_is_long_until_the_first_step_is_done_after_a_resume_too(ranks, phases):
    (watchdog,) = ranks(1, patience=1.0, slow=50.0).watchdogs
    for phase in (*phases, "training"):
        watchdog.beat(phase, 700 if phase == "training" else 0)
    assert watchdog.limit() == 50.0
    watchdog.beat("training", 701)
    assert watchdog.limit() == 1.0


def test_the_sample_index_may_take_longer_than_anything_else(ranks):
    (watchdog,) = ranks(1, patience=1.0, slow=50.0, index=400.0).watchdogs
    watchdog.beat("indexing", 0)
    assert watchdog.limit() == 400.0
    watchdog.beat("starting", 0)
    assert watchdog.limit() == 50.0


def test_a_slow_machine_is_no_hung_one(ranks):
    job = settled(ranks(1, patience=2.0, slow=50.0))
    (watchdog,) = job.watchdogs
    begun = watchdog._seconds
    job.start()
    while watchdog._seconds < begun + 0.6:  # as the watchdog counts: a busy machine wakes it late
        threading.Event().wait(0.01)
    watchdog.beat("training", 2)
    assert 2.0 < watchdog.limit() < 50.0
    assert not job.ended[0].is_set()


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
