"""Ranks that are played through against one another, with programs written by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from plt_megatron.config.layout import ParallelLayout
from plt_megatron.predict.rehearsal.matching import group_problems, play
from plt_megatron.predict.rehearsal.record import Call, RankRecord
from plt_megatron.predict.rehearsal.rehearse import ranks_of_each_kind
from plt_megatron.predict.rehearsal.report import _host_waits, _waiting

PAIR = (0, 2, 1)


def record(rank: int, *calls: Call, groups: dict | None = None) -> RankRecord:
    return RankRecord(rank, {"pp": rank, "tp": 0, "cp": 0, "dp": 0}, list(calls), groups or {PAIR: (0, 1)})


def collective(elements: int = 8, work: int = 0, group: str = "tensor model parallel") -> Call:
    return Call("all_reduce", group, PAIR, -1, "float32", elements, 4 * elements, "forward 1", work)


def send(peer: int, elements: int = 8, work: int = 0) -> Call:
    return Call("send", "pipeline model parallel", PAIR, peer, "float32", elements, 4 * elements, "forward 1", work)


def recv(peer: int, elements: int = 8, work: int = 0) -> Call:
    return Call("recv", "pipeline model parallel", PAIR, peer, "float32", elements, 4 * elements, "forward 1", work)


def wait(position: int, work: int = 0) -> Call:
    return Call("wait", "pipeline model parallel", PAIR, position, work=work)


def test_ranks_that_fit_together_and_who_waits():
    """Rank 1 has 30 FLOPs to do before it can join rank 0, which has 10; it sends after 50 what rank 0 awaits at 20."""
    first = record(0, collective(work=10), recv(1, work=20), wait(1, work=20))
    second = record(1, collective(work=30), send(0, work=50))
    waiting = play([first, second])
    assert waiting.problems == [] and waiting.matched == 2
    assert waiting.idle == {(0, 1): 20 + 10}


def test_validation_after_the_step_is_no_part_of_it():
    def measured(work: int) -> Call:
        return dataclasses.replace(collective(work=work), phase="validation")

    waiting = play([record(0, collective(work=10), measured(12)), record(1, collective(work=30), measured(90))])
    assert waiting.problems == [] and waiting.matched == 2
    assert waiting.idle == {(0, 1): 20} and waiting.work == {0: 10, 1: 30}


def test_waits_are_told_as_those_of_all_microbatches_or_of_those_rehearsed():
    waits = {("forward 1", "a"): 6, ("loss", "b"): 1, ("validation", "c"): 1}
    first = dataclasses.replace(record(0, collective(work=10)), waits=waits, microbatches=6)
    second = dataclasses.replace(record(1, collective(work=40)), microbatches=6)
    estimate = SimpleNamespace(layout=SimpleNamespace(microbatches=64))
    found: Any = SimpleNamespace(records=[first, second], estimate=estimate, waiting=play([first, second]))
    one, other = _host_waits(found)
    assert "64 times per step at a" in one and "1 time per step at b" in other
    assert "rank 0 waits for rank 1: 75 % of its time in 6 of 64 microbatches" in _waiting(found)[1]


def test_a_message_sent_before_it_is_awaited_costs_nothing():
    waiting = play([record(0, send(1)), record(1, recv(0, work=5), wait(0, work=9))])
    assert waiting.problems == [] and not waiting.idle


def test_mismatches_are_named():
    (problem,) = play([record(0, collective(8)), record(1, collective(9))]).problems
    assert problem.startswith("mismatched collective: rank") and "of 8 " in problem and "of 9 " in problem
    (problem,) = play([record(0, send(1, 8)), record(1, recv(0, 9), wait(0))]).problems
    assert problem.startswith("mismatched message: rank 0's send") and "rank 1's recv" in problem


def test_a_collective_that_one_rank_leaves_out_blocks_the_other():
    (problem,) = play([record(0, collective(), collective()), record(1, collective())]).problems
    assert problem.startswith("waits forever: rank 0 in all_reduce") and problem.endswith("rank 1 has finished")


def test_ranks_that_wait_for_each_others_messages():
    problems = play([record(0, recv(1), wait(0), send(1)), record(1, recv(0), wait(0), send(0))]).problems
    assert [each.split(" in ")[0] for each in problems] == ["waits forever: rank 0", "waits forever: rank 1"]


def test_a_message_without_a_receiver():
    (problem,) = play([record(0, send(1)), record(1)]).problems
    assert problem.startswith("never received: rank 0's send to rank 1")


def test_one_communicator_is_not_another_of_the_same_ranks():
    (problem,) = play([record(0, collective(group="embedding")), record(1, collective())]).problems
    assert problem.startswith("mismatched collective")


def test_groups_are_compared_with_the_layouts():
    layout = ParallelLayout(tensor=2, data=2)
    right = record(0, collective())
    assert group_problems([right], layout) == []
    (problem,) = group_problems([record(0, collective(), groups={PAIR: (0, 2)})], layout)
    assert problem.startswith("wrong group: rank 0's") and problem.endswith("has ranks 0, 2, the layout 0, 1")


def test_every_stage_is_rehearsed_and_both_ends_of_the_other_dimensions():
    layout = ParallelLayout(tensor=4, pipeline=3, data=8)
    assert ranks_of_each_kind(layout) == [0, 3, 28, 32, 35, 64, 67]
    assert ranks_of_each_kind(ParallelLayout()) == [0]
