"""What follows from a run's history."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jobs import job_settings

from plt_megatron.launcher.decisions import decide, is_explained, last_error, outcome_of
from plt_megatron.launcher.records import Exit


def end(status: str, step: int = 0, checkpoint: int = 0, **more) -> dict:
    return {"event": "end", "status": status, "step": step, "checkpoint": checkpoint, "reason": "because"} | more


def bad(*nodes: str) -> dict:
    return end("node_failed", bad_nodes=dict.fromkeys(nodes, "no space"))


def action(*events: dict, **changes) -> str:
    return decide(list(events), job_settings(**changes)).action


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
    decision = decide([end("failed", 7, 6), end("failed", 7, 6)], job_settings())
    assert decision.reason == "because; it has failed again since its last progress, step 7"
    decision = decide([end("failed", 100, 50), end("failed", 60, 50), end("failed", 55, 50)], job_settings())
    assert decision.reason.endswith("2 times more since its last progress, step 100")


def test_failures_that_come_further_do_not():
    assert action(end("failed", 7, 6), end("failed", 9, 8), end("failed", 20, 20)) == "again"
    assert action(end("failed", 7, 6), end("failed", 9, 6)) == "again", "a step further is further"
    assert action(end("failed", 9, 6), end("failed", 8, 6)) == "stop"
    assert action(end("failed", 7, 4), end("failed", 7, 6)) == "again", "so is a checkpoint"
    nothing = end("failed") | {"step": None, "checkpoint": None}  # a disk did not answer
    assert action(nothing, end("failed", 1)) == "again" and action(nothing, nothing) == "stop"


def test_how_many_is_a_setting():
    repeated = [end("failed", 7, 6)] * 3
    assert action(*repeated, max_requeues_without_progress=3) == "again"
    assert action(*repeated, max_requeues_without_progress=2) == "stop"
    decision = decide(repeated[:1], job_settings(max_requeues_without_progress=0))
    assert (decision.action, decision.reason) == ("stop", "because; it has failed since its last progress, step 7")


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
        decision = decide(events[:count], job_settings(max_exclusions=limit))
        assert decision.action == "exclude" and list(decision.nodes) == [f"node{count - 1}"]
    assert action(*events, bad("node9"), max_exclusions=limit) == "stop"


def test_bad_nodes_of_before_the_last_progress_do_not_count():
    """In a run of months, and in a chain, whose next job does not know which nodes were bad."""
    events = [bad("n7"), end("preempted", 1000, 1000), bad("n7"), end("preempted", 2000, 2000), bad("n7")]
    assert action(*events, max_exclusions=2) == "exclude"
    assert action(*events, bad("n7"), bad("n7"), max_exclusions=2) == "stop"
    trained = [bad("n7") | {"step": 1000 * n, "checkpoint": 1000 * n} for n in range(1, 6)]  # lost after days each
    assert action(*trained, max_exclusions=2) == "exclude"


def test_what_preflight_finds_is_no_lack_of_progress():
    assert action(end("failed", 7, 6), bad("node1"), end("preempted", 9, 9)) == "again"
    assert action(end("failed", 7, 6), bad("node1"), end("failed", 7, 6)) == "stop"


def test_a_run_given_up_and_started_again_begins_anew():
    """Somebody has put something right."""
    history = [end("failed", 7, 6), end("failed", 7, 6), {"event": "stop"}, {"event": "start"}]
    assert action(*history, end("failed", 7, 6)) == "again"
    assert action(*history, end("failed", 7, 6), end("failed", 7, 6)) == "stop"
    assert action(end("failed", 7, 6), {"event": "stop"}) == "stop"  # launchers that outlive their srun ask once more


# Which rank is named as the cause.


TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 3, in f
    1 / 0
ZeroDivisionError: division by zero""".splitlines()
ECHO = ["error: rank 2: lost the connection to another rank, which has ended (...). The last checkpoint is intact: ..."]
GLOO = ["Traceback (most recent call last):", "RuntimeError: [pair.cc:561] Connection closed by peer [10.0.0.1]:4"]
NCCL = [
    "torch.distributed.DistBackendError: NCCL error in: ncclRemoteError: A call failed possibly due to a network error"
]


def exits(*ends: tuple[int, list[str]]) -> list[Exit]:
    return [Exit(rank, f"node{rank // 2}", code, lines) for rank, (code, lines) in enumerate(ends)]


def test_a_signal_is_the_cause_though_the_echoes_came_first():
    outcome = outcome_of(exits((1, GLOO), (1, ECHO), (-9, []), (1, NCCL)), preempted=False)
    assert outcome.status == "failed" and outcome.retry
    assert outcome.failure.rank == 2 and outcome.failure.node == "node1"
    assert outcome.reason == "rank 2 on node1 was killed by SIGKILL (out of memory?)"


def test_an_exception_is_told_from_its_echoes():
    outcome = outcome_of(exits((1, GLOO), (1, NCCL), (1, ECHO), (1, TRACEBACK)), preempted=False)
    assert outcome.failure.rank == 3 and "ZeroDivisionError: division by zero" in outcome.reason
    assert outcome.failure.lines == TRACEBACK


def test_exceptions_are_told_apart_with_torchs_mark_of_the_rank(tmp_path):
    """Once a process group exists, torch marks every line of an exception that nobody catches."""
    program = (
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "class Mapped:\n"
        "    def __del__(self): self.reader\n"
        "mapped = Mapped()\n"
        "raise MemoryError('20 GiB')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    lines = ended.stderr.splitlines()
    assert ended.returncode == 1 and "[rank0]: MemoryError: 20 GiB" in lines, "or torch has changed its mark"
    assert any("AttributeError" in line for line in lines), "ignored at exit, after the cause"
    marked = [f"[rank9]: {line}" for line in NCCL]
    ends = exits((1, marked), (-6, []), (1, lines))
    assert last_error(lines) == "MemoryError: 20 GiB"
    assert last_error([*lines, "error: no space"]) == "no space", "an ignored exception ends with its last line"
    assert not is_explained(ends[0]) and is_explained(ends[2])
    assert outcome_of([ends[0], ends[2]], preempted=False).failure is ends[2]


def test_who_names_another_is_heard_before_those_who_say_nothing():
    named = ["error: rank 0: no sign of life from rank 3 on node1 (5 s): dead, stopped, or cut off; stacks in x"]
    outcome = outcome_of(exits((1, named), (1, []), (1, [])), preempted=False)
    assert "no sign of life from rank 3 on node1" in outcome.reason


def test_an_echo_after_the_cause_does_not_hide_it():
    """Ranks 1 and 2 leave while rank 0, which names the one that hangs, is still writing down where it stands."""
    named = ["error: rank 0: no sign of life from rank 3 (12 s): dead, stopped, or cut off", *ECHO]
    ends = exits((1, named), (1, []), (1, []))
    assert is_explained(ends[0]) and "no sign of life from rank 3" in outcome_of(ends, preempted=False).reason
    assert not any(map(is_explained, exits((1, ECHO), (1, []))))


def test_a_process_that_nccl_aborts_is_an_echo():
    out_of_memory = ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"]
    aborted = [*NCCL, "terminate called after throwing an instance of 'c10::DistBackendError'"]
    ends = exits((-6, aborted), (-6, aborted), (1, out_of_memory))
    assert list(map(is_explained, ends)) == [False, False, True]
    assert outcome_of(ends, preempted=False).failure.rank == 2
    assert outcome_of(exits((-6, []), (1, NCCL)), preempted=False).failure.rank == 0, "aborted by something else"


@pytest.mark.parametrize(
    ("likelier", "other"),
    [
        ((-9, []), (1, TRACEBACK)),
        ((-11, NCCL), (1, TRACEBACK)),  # NCCL aborts a process, and does not crash it
        ((-6, TRACEBACK), (2, TRACEBACK)),
        ((2, TRACEBACK), (1, TRACEBACK)),  # a status that somebody chose
        ((1, TRACEBACK), (1, [])),
        ((1, []), (1, GLOO)),
        ((1, []), (-6, NCCL)),
    ],
    ids=str,
)
def test_of_two_the_likelier_cause_is_named_whoever_came_first(likelier, other):
    assert outcome_of(exits(likelier, other), preempted=False).failure.rank == 0
    assert outcome_of(exits(other, likelier), preempted=False).failure.rank == 1


def test_who_ended_in_peace_explains_nothing():
    assert not any(map(is_explained, exits((0, TRACEBACK), (75, TRACEBACK))))


def test_nothing_but_echoes_names_the_first():
    assert outcome_of(exits((0, []), (1, GLOO), (1, ECHO)), preempted=False).failure.rank == 1


def test_a_users_error_is_not_tried_again():
    outcome = outcome_of(exits((2, ["error: data.sources: gone.bin not found"]), (2, []), (2, [])), preempted=False)
    assert not outcome.retry and outcome.reason.endswith(": data.sources: gone.bin not found")
    # ... but it may be one node that does not see the file.
    assert outcome_of(exits((2, []), (1, [])), preempted=False).retry


def test_peaceful_ends():
    assert outcome_of(exits((0, []), (0, [])), preempted=False).status == "finished"
    asked = outcome_of(exits((75, []), (75, [])), preempted=True)
    assert asked.status == "preempted" and asked.retry
    unasked = outcome_of(exits((75, []), (75, [])), preempted=False)
    assert unasked.status == "preempted" and not unasked.retry, "a file named STOP: somebody wants it so"
    assert outcome_of(exits((0, []), (75, [])), preempted=True).status == "preempted"
    assert outcome_of(exits((75, []), (1, TRACEBACK)), preempted=True).status == "failed"


def test_the_line_that_says_what_went_wrong():
    assert last_error(["error: first", "error: second", "  Stack 0x1"]) == "second"
    assert last_error([*TRACEBACK, "[W123] a warning afterwards"]) == "ZeroDivisionError: division by zero"
    assert last_error(["step 3/4: loss 1.0", "Errors: 0"]) is None
