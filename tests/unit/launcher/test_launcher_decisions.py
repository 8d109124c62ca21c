"""What follows from a run's history."""

from __future__ import annotations

import pytest

from plt_megatron.launcher.decisions import decide
from plt_megatron.launcher.job import JobSettings


def settings(**changes) -> JobSettings:
    return JobSettings("job", 2, 2, 1, 0, 3600, "python", **changes)


def end(status: str, step: int = 0, checkpoint: int = 0, **more) -> dict:
    return {"event": "end", "status": status, "step": step, "checkpoint": checkpoint, "reason": "because"} | more


def bad(*nodes: str) -> dict:
    return end("node_failed", bad_nodes=dict.fromkeys(nodes, "no space"))


def action(*events: dict, **changes) -> str:
    return decide(list(events), settings(**changes)).action


def test_the_plain_cases():
    assert action(end("finished", 10, 10)) == "finish"
    assert action(end("preempted", 5, 5)) == "again"
    assert action(end("preempted", 5, 5, retry=False)) == "halt"
    assert action(end("failed", 5, 4)) == "again"
    assert action(end("failed", 0, 0)) == "again", "the first time"
    assert action(end("failed", 5, 4, retry=False)) == "stop"
    assert action(end("node_failed", 5, 4)) == "again"
    assert action(end("killed", 5, 4)) == "again"


def test_a_failure_at_the_same_place_stops_the_run():
    assert action(end("failed", 7, 6), end("failed", 7, 6)) == "stop"
    assert action(end("failed"), end("failed")) == "stop"
    decision = decide([end("failed", 7, 6), end("failed", 7, 6)], settings())
    assert decision.reason == "because; it has failed again since its last progress, step 7"


def test_failures_that_come_further_do_not():
    assert action(end("failed", 7, 6), end("failed", 9, 8), end("failed", 20, 20)) == "again"
    assert action(end("failed", 7, 6), end("failed", 9, 6)) == "again", "a step further is further"
    assert action(end("failed", 9, 6), end("failed", 8, 6)) == "stop"


def test_how_many_is_a_setting():
    repeated = [end("failed", 7, 6)] * 3
    assert action(*repeated, max_requeues_without_progress=3) == "again"
    assert action(*repeated, max_requeues_without_progress=2) == "stop"


def test_lost_nodes_and_preemptions_are_no_failures():
    assert action(end("failed", 7, 6), end("killed", 7, 6), end("preempted", 6, 6), end("node_failed", 6, 6)) == "again"
    assert action(end("failed", 7, 6), end("killed", 7, 6), end("failed", 7, 6)) == "stop"


def test_but_not_for_ever():
    assert action(*[end("preempted", 0, 0)] * 6) == "again"
    assert action(*[end("preempted", 0, 0)] * 7) == "stop"
    assert action(*[end("killed", n, n) for n in range(20)]) == "again"


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_bad_nodes_are_left_out_so_many_times(limit):
    events = [bad(f"node{n}") for n in range(limit)]
    for count in range(1, limit + 1):
        decision = decide(events[:count], settings(max_exclusions=limit))
        assert decision.action == "exclude" and list(decision.nodes) == [f"node{count - 1}"]
    assert action(*events, bad("node9"), max_exclusions=limit) == "stop"


def test_what_preflight_finds_is_no_lack_of_progress():
    assert action(end("failed", 7, 6), bad("node1"), end("preempted", 9, 9)) == "again"
    assert action(end("failed", 7, 6), bad("node1"), end("failed", 7, 6)) == "stop"


def test_a_run_given_up_and_started_again_begins_anew():
    """Somebody has put something right."""
    history = [end("failed", 7, 6), end("failed", 7, 6), {"event": "stop"}, {"event": "start"}]
    assert action(*history, end("failed", 7, 6)) == "again"
    assert action(*history, end("failed", 7, 6), end("failed", 7, 6)) == "stop"
