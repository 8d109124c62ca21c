"""The coordinator with nodes and a clock that the test plays."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from jobs import job_settings

from plt_megatron.launcher import coordinator as coordinating
from plt_megatron.launcher.coordinator import Coordinator
from plt_megatron.launcher.job import Allocation
from plt_megatron.launcher.records import Records
from plt_megatron.run_folder.attempts import ExitStatus
from plt_megatron.run_folder.folder import RunFolder

FACTS = {
    "devices": [],
    "versions": {"torch": "2.14.1"},
    "space": {"/dev/shm": 1 << 40, "temporary": 1 << 40, "run": 1 << 40},
    "temporary": "/tmp",
    "run_error": None,
    "skew": 0.0,
}


class Play:
    """Two nodes of two processes, unless `nodes` says otherwise."""

    def __init__(self, run: Path, nodes: tuple[str, ...] = ("a", "b"), end_time: float = math.inf, **settings) -> None:
        self.run, self.now, self.nodes = run, 0.0, nodes
        self.sent: list[tuple[str, dict]] = []
        self.said: list[str] = []
        allocation = Allocation(7, "7", 0, nodes, 0, end_time)
        job = job_settings(nodes=len(nodes), **settings)
        records = Records(run, allocation)

        def send(node: str, message: dict) -> None:
            self.sent.append((node, message))

        self.coordinator = Coordinator(allocation, job, records, send, self.said.append, lambda: self.now)

    def told(self, kind: str) -> list[str]:
        """The nodes that were sent something since the last call."""
        nodes = [node for node, message in self.sent if message["type"] == kind]
        self.sent.clear()
        return nodes

    def after(self, seconds: float) -> None:
        """Time passes, and the nodes give signs of life."""
        self.now += seconds
        for node in self.nodes:
            self.coordinator.handle(node, {"type": "beat"})
        self.coordinator.tick()

    def hello(self, *nodes: str, **facts) -> None:
        for node in nodes or self.nodes:
            self.coordinator.handle(node, {"type": "hello", "facts": FACTS | facts})

    def exited(self, rank: int, code: int, task: str = "train", lines: list | None = None, attempt: int | None = None):
        node = self.nodes[rank if task == "probe" else rank // 2]
        message = {"type": "exited", "task": task, "rank": rank, "code": code, "lines": lines or []}
        self.coordinator.handle(node, message | {"attempt": attempt or self.coordinator.attempt})

    def all_exited(self, code: int, lines: list | None = None) -> None:
        for rank in range(4):
            self.exited(rank, code, lines=lines)

    def probed(self, *versions: str) -> None:
        """All processes of the check end well."""
        for rank, node in enumerate(self.nodes):
            result = {"rank": rank, "stage": 4, "error": None, "all_reduce": 1.0, "receive": 1.0}
            result["versions"] = {"nccl": (versions or ("2.27",) * len(self.nodes))[rank]}
            message = {"type": "probe", "attempt": self.coordinator.attempt, "result": result}
            self.coordinator.handle(node, message)
            self.exited(rank, 0, "probe")

    def stopped(self, *nodes: str) -> None:
        for node in nodes or self.nodes:
            self.coordinator.handle(node, {"type": "stopped"})

    def train(self) -> None:
        """Come to where the ranks run."""
        self.hello()
        self.probed()
        assert self.sent[-1][1]["task"] == "train"
        self.sent.clear()

    @property
    def ends(self) -> list[dict]:
        return [event for event in RunFolder(self.run).attempts() if event["event"] == "end"]


@pytest.fixture
def play(tmp_path):
    return Play(tmp_path)


def test_a_job_from_hello_to_quit(play):
    play.hello("b")
    assert play.sent == [], "it waits for all"
    play.hello("a")
    assert [message["task"] for _, message in play.sent] == ["probe", "probe"]
    ports = {message["port"] for _, message in play.sent}
    play.sent.clear()
    play.probed()
    assert [message["task"] for _, message in play.sent] == ["train", "train"]
    assert len(ports | {message["port"] for _, message in play.sent}) == 2
    for rank in (3, 0, 2):
        play.exited(rank, 0)
    assert play.coordinator.status is None
    play.exited(1, 0)
    play.stopped()
    assert play.coordinator.status == 0 and play.told("quit") == ["a", "b"]
    assert [end["status"] for end in play.ends] == ["finished"]
    assert any("all-reduce" in line for line in play.said)


def test_one_node_of_one_process_has_nothing_to_check(tmp_path):
    play = Play(tmp_path, nodes=("a",))
    play.hello("a")
    assert [message["task"] for _, message in play.sent] == ["train"]


def test_a_node_that_does_not_come_is_the_bad_one(play):
    play.hello("a")
    play.after(coordinating.JOIN_SECONDS - 1)
    assert play.coordinator.status is None
    play.after(2)
    play.stopped("a")
    assert play.coordinator.status == ExitStatus.BAD_NODE
    assert play.ends[0]["bad_nodes"] == {"b": "its launcher did not report within 300 s"}


def test_no_node_comes(play):
    play.after(coordinating.JOIN_SECONDS + 1)
    assert play.coordinator.status == ExitStatus.USER_ERROR and not play.ends[0]["retry"]


def test_bad_facts_end_it_before_anything_starts(play):
    play.hello("a")
    play.hello("b", versions={"torch": "2.13"})
    assert play.told("start") == []
    play.stopped()
    assert play.coordinator.status == ExitStatus.BAD_NODE
    assert play.ends[0]["status"] == "node_failed" and "b: torch 2.13 instead of 2.14.1" in play.ends[0]["reason"]


@pytest.mark.parametrize(
    ("fact", "said"),
    [({"run_error": "/r: cannot be written to"}, "/r"), ({"space": {**FACTS["space"], "run": 5 << 20}}, "5 MiB free")],
)
def test_what_is_wrong_everywhere_is_nobodys_node(play, fact, said):
    play.hello(**fact)
    play.stopped()
    (end,) = play.ends
    assert play.coordinator.status == ExitStatus.USER_ERROR and not end["bad_nodes"] and said in end["reason"]


def test_a_check_that_hangs_names_the_node_behind(play):
    play.hello()
    result = {"rank": 0, "stage": 1, "error": None, "versions": {}}
    play.coordinator.handle("a", {"type": "probe", "attempt": 1, "result": result})
    play.after(coordinating.PROBE_SECONDS + 1)
    play.stopped()
    assert play.coordinator.status == ExitStatus.BAD_NODE and list(play.ends[0]["bad_nodes"]) == ["b"]


def test_libraries_that_only_the_check_sees(play):
    play.hello()
    play.probed("2.27", "2.26")
    play.stopped()
    assert play.ends[0]["bad_nodes"] == {"b": "nccl 2.26 instead of 2.27"}


def test_a_dead_rank_is_settled_stopped_and_started_again(play):
    play.train()
    play.exited(2, -9)
    assert play.told("stop") == [], "others may say more"
    play.exited(0, 1, lines=["RuntimeError: Connection closed by peer"])
    play.after(coordinating.SETTLE_SECONDS + 0.1)
    assert play.told("stop") == ["a", "b"]
    play.exited(1, -9)  # what the stop has done counts no more
    play.stopped()
    assert play.ends[0]["failure"]["rank"] == 2 and play.ends[0]["failure"]["node"] == "b"
    assert play.coordinator.attempt == 2 and play.coordinator.status is None
    play.probed()
    assert play.sent[-1][1] == {**play.sent[-1][1], "task": "train", "attempt": 2}
    play.exited(0, 1, attempt=1)  # an echo of the first attempt
    play.all_exited(0)
    play.stopped()
    assert play.coordinator.status == 0 and [end["status"] for end in play.ends] == ["failed", "finished"]


def test_who_says_nothing_gives_the_watchdog_time_to_speak(play):
    """Ranks leave silently at its verdict; rank 0, which says it, leaves last."""
    play.train()
    play.exited(1, 1)
    play.exited(2, 1, lines=["error: rank 2: lost the connection to another rank, which has ended (x). y"])
    play.after(coordinating.SETTLE_SECONDS + 1)
    assert play.told("stop") == []
    play.exited(0, 1, lines=["error: rank 0: no sign of life from rank 3 on b (5 s): dead, stopped, or cut off"])
    play.after(coordinating.SETTLE_SECONDS + 1)
    assert play.told("stop") == ["a", "b"]
    play.stopped()
    assert "no sign of life from rank 3 on b" in play.ends[0]["reason"]


def test_silence_is_not_waited_for_for_ever(play):
    play.train()
    play.exited(1, 1)
    play.after(coordinating.UNEXPLAINED_SECONDS + 1)
    assert play.told("stop") == ["a", "b"]


def test_all_ranks_dead_need_no_settling(play):
    play.train()
    play.all_exited(1, lines=["ValueError: x"])
    assert play.told("stop") == ["a", "b"]


def test_restarts_are_limited(tmp_path):
    play = Play(tmp_path, max_restarts=2)
    play.train()
    for attempt in (1, 2, 3):
        assert play.coordinator.attempt == attempt
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": attempt}) + "\n")  # it comes further each time
        play.all_exited(1)
        play.stopped()
        if attempt < 3:
            play.probed()
    assert play.coordinator.status == ExitStatus.FAILED


def test_no_restart_without_progress(tmp_path):
    play = Play(tmp_path, max_restarts=5)
    play.train()
    for _ in (1, 2):
        play.all_exited(1)
        play.stopped()
        play.probed()
    assert play.coordinator.status == ExitStatus.FAILED and len(play.ends) == 2


def test_a_users_error_is_not_tried_again(play):
    play.train()
    play.all_exited(2)
    play.stopped()
    assert play.coordinator.status == ExitStatus.USER_ERROR and play.coordinator.attempt == 1


def test_a_silent_node_ends_the_attempt(play):
    play.train()
    play.now += coordinating.SILENCE_SECONDS / 2
    play.coordinator.handle("a", {"type": "beat"})
    play.now += coordinating.SILENCE_SECONDS / 2 + 1
    play.coordinator.tick()
    assert play.told("stop") == ["a"]
    play.stopped("a")
    assert play.coordinator.status == ExitStatus.NODE_LOST
    assert "b is lost: its launcher has been silent for 901 s" in play.ends[0]["reason"]


def test_a_lost_launcher_ends_the_attempt_at_once(play):
    play.train()
    play.coordinator.lost("b", "its launcher has ended")
    play.stopped("a")
    assert play.coordinator.status == ExitStatus.NODE_LOST and play.told("quit") == ["a"]


def test_a_node_lost_while_stopping_holds_nothing_up(play):
    play.train()
    play.all_exited(1)
    play.stopped("a")
    play.coordinator.lost("b", "its launcher has ended")
    assert [end["status"] for end in play.ends] == ["failed"]
    assert play.coordinator.status == ExitStatus.FAILED, "no restart with a node less"


def test_processes_that_cannot_be_ended_hold_nothing_up(play):
    play.train()
    play.all_exited(1)
    play.after(coordinating.STOP_SECONDS + 1)
    assert len(play.ends) == 1


def test_a_request_to_stop_reaches_all_and_is_no_failure(play):
    play.train()
    play.coordinator.preempt()
    play.coordinator.preempt()
    assert play.told("preempt") == ["a", "b"]
    play.all_exited(75)
    play.stopped()
    assert play.coordinator.status == 75 and play.ends[0]["status"] == "preempted" and play.ends[0]["retry"]


def test_a_time_limit_that_was_extended_ends_nothing(tmp_path, monkeypatch):
    """The job knows only the end that it began with, which lies in the past when Slurm warns."""
    play = Play(tmp_path, end_time=time.time() + 500)
    play.train()
    later = time.time() + 1200
    monkeypatch.setattr(coordinating.time, "time", lambda: later)
    play.coordinator.preempt()
    play.after(coordinating.STOP_SECONDS)
    assert play.coordinator.status is None and not play.told("stop")


@pytest.mark.parametrize("stuck", [1, 10])
def test_what_does_not_save_before_the_time_limit_is_ended_before_slurm_ends_the_job(tmp_path, monkeypatch, stuck):
    """A job that is out of time is not requeued. The limit is 200 s away when Slurm warns. The launcher's clock may
    stand still meanwhile."""
    play = Play(tmp_path, end_time=time.time() + 500)
    play.train()
    play.after(300)
    later = time.time() + 300
    monkeypatch.setattr(coordinating.time, "time", lambda: later)
    monkeypatch.setattr(coordinating.time, "monotonic", lambda: 1000 + stuck * (play.now - 300))
    play.coordinator.preempt()
    play.after((200 - coordinating.STOP_SECONDS - coordinating._LEAVE_SECONDS - 5) / stuck)
    assert play.coordinator.status is None and not play.told("stop")
    play.after(6 / stuck)
    assert play.told("stop") == ["a", "b"]
    play.stopped()
    assert play.ends[0]["status"] == "failed" and play.ends[0]["retry"] and "time limit" in play.ends[0]["reason"]


@pytest.mark.parametrize("joined", [0, 1, 2])
def test_a_request_to_stop_before_training(play, joined):
    for node in play.nodes[:joined]:
        play.hello(node)
    play.coordinator.preempt()
    play.stopped(*play.nodes[:joined])
    assert play.coordinator.status == 75 and play.ends[0]["status"] == "preempted"


def test_a_request_to_stop_while_an_attempt_fails_starts_no_other(play):
    play.train()
    play.all_exited(1)
    play.coordinator.preempt()
    play.stopped()
    assert play.coordinator.status == ExitStatus.FAILED and len(play.ends) == 1


def test_slurm_ends_the_job_since_a_node_is_gone(play):
    """It finds out before our own patience is at its end: the silence says why."""
    play.train()
    play.now += 15
    play.coordinator.handle("a", {"type": "beat"})
    play.coordinator.preempt()
    play.now += 9
    play.coordinator.handle("a", {"type": "beat"})
    play.coordinator.tick()
    play.stopped("a")
    assert play.ends[0]["status"] == "node_failed" and "b is lost: " in play.ends[0]["reason"]
    assert "silent for 24 s" in play.ends[0]["reason"]


def test_a_node_whose_messages_are_read_late_saves_too(play):
    """The first node's launcher stood still for a while, and reads one connection after the other."""
    play.train()
    play.now += 15
    play.coordinator.preempt()
    play.coordinator.tick()
    assert play.told("preempt") == ["a", "b"]
    play.after(9)
    play.all_exited(75)
    play.stopped()
    assert play.ends[0]["status"] == "preempted"


def test_no_restart_beside_processes_that_could_not_be_ended(play):
    """They hold their GPUs: the next attempt is another start of the job."""
    play.train()
    play.exited(0, 1, lines=["error: no"])
    play.after(5)
    play.stopped("a")
    play.after(31)
    assert play.coordinator.status == ExitStatus.FAILED and len(play.ends) == 1 and play.coordinator.attempt == 1


def test_ranks_that_do_not_leave_with_the_others(play):
    play.train()
    for rank in (0, 1, 2):
        play.exited(rank, 0)
    play.after(1000)
    assert play.coordinator.status is None
    play.after(1000)
    play.stopped()
    assert "ranks [3] did not end with the others" in play.ends[0]["reason"]
