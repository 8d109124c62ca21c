"""What is asked of Slurm, with its commands faked; tests/slurm asks a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from plt_megatron.slurm import client
from plt_megatron.slurm.client import Scheduler, SlurmError, job_at_work


class Fake:
    def __init__(self, **answers: str) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, *command, tries) -> str:
        assert tries > 1
        self.asked.append(list(command))
        words = [word for word in command[:3] if word in self.answers]
        return self.answers[words[-1]] if words else ""


@pytest.fixture
def ask(monkeypatch):
    """A job's Slurm that answers as `fake` does."""

    def scheduler(job: str, fake: Fake) -> Scheduler:
        monkeypatch.setattr(client, "_ask", fake)
        return Scheduler(job)

    return scheduler


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Makes the program of that name of a shell's lines."""

    def write(lines: str) -> None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return write


def show(state: str = "RUNNING", excluded: str = "(null)", requeue: int = 1, preempted: str = "None") -> str:
    return (
        f"JobId=7 JobName=x\n   JobState={state} Reason=None Dependency=(null)\n   Requeue={requeue} Restarts=0\n"
        f"   PreemptEligibleTime=2026-11-25T09:25:45 PreemptTime={preempted}\n"
        f"   QOS=low Partition=main AllocNode:Sid=ctl:1\n   ReqNodeList=(null) ExcNodeList={excluded}\n"
    )


ENDED = [
    *("CANCELLED", "COMPLETING", "PENDING", "TIMEOUT", "PREEMPTED"),
    *("EXPEDITING", "RESV_DEL_HOLD", "STAGE_OUT"),
]
GOES_ON = ["RUNNING", "SIGNALING", "SUSPENDED"]


@pytest.mark.parametrize("state", ENDED + GOES_ON)
def test_whether_slurm_has_ended_a_job(state, ask):
    assert ask("7", Fake(show=show(state))).ended_by_slurm() == (state if state in ENDED else None)


def test_requeue(ask):
    fake = Fake(show=show())
    ask("7_2", fake).requeue()
    assert fake.asked[1:] == [["scontrol", "requeue", "7_2"]]


def test_a_job_that_is_not_to_be_requeued_is_for_once(ask):
    """scontrol refuses to requeue what was submitted with --no-requeue."""
    fake = Fake(show=show(requeue=0))
    ask("7", fake).requeue(["n5"])
    assert fake.asked[1:] == [
        ["scontrol", "update", "JobId=7", "Requeue=1"],
        ["scontrol", "requeue", "7"],
        ["scontrol", "update", "JobId=7", "Requeue=0", "ExcNodeList=n5"],
    ]


@pytest.mark.parametrize(
    "job, mode, expected",
    [
        (show(preempted="2026-11-25T09:25:46"), "REQUEUE", True),
        (show(preempted="2026-11-25T09:25:46"), "CANCEL", False),
        (show(preempted="2026-11-25T09:25:46", requeue=0), "REQUEUE", False),
        (show(), "REQUEUE", False),
    ],
)
def test_a_preempted_job_may_be_requeued_by_slurm(job, mode, expected, ask):
    fake = Fake(show=job, config="PreemptType = preempt/partition_prio\n", partition=f"PreemptMode={mode}\n")
    assert ask("7", fake).is_requeued_by_slurm() is expected


@pytest.mark.parametrize("of_qos, of_cluster", [("requeue", "CANCEL"), ("cluster", "REQUEUE"), ("cancel", "REQUEUE")])
def test_with_preemption_by_qos_the_partition_has_no_say(of_qos, of_cluster, ask):
    config = f"PreemptMode             = {of_cluster}\nPreemptType             = preempt/qos\n"
    fake = Fake(show=show(preempted="2026-11-25T09:25:46"), config=config, sacctmgr=f"{of_qos}\n")
    assert ask("7", fake).is_requeued_by_slurm() is (of_qos != "cancel")
    assert "low" in fake.asked[-1]


def test_a_job_whose_bad_node_stays_allowed_does_not_start_again(ask):
    class Refuses(Fake):
        def __call__(self, *command, tries) -> str:
            answer = super().__call__(*command, tries=tries)
            if command[1] == "update":
                raise SlurmError("Access denied")
            return answer

    fake = Refuses(show=show())
    with pytest.raises(SlurmError, match="denied"):
        ask("7", fake).requeue(["n5"])
    assert fake.asked[-1] == ["scancel", "7"]


def test_nodes_are_excluded_besides_those_that_were(ask):
    fake = Fake(show=show(excluded="n[1-2]"))
    ask("7", fake).requeue(["n5", "n2"])
    assert fake.asked[1:] == [["scontrol", "requeue", "7"], ["scontrol", "update", "JobId=7", "ExcNodeList=n1,n2,n5"]]


def test_the_rest_of_a_chain_runs_the_same_script(ask):
    script = "/runs/a b/job.sbatch"
    lines = f"6|{script}\n7|{script}\n8|{script}.old\n9|{script} -x"
    assert ask("7", Fake(squeue=lines)).pending_after(Path(script)) == ["6", "9"]


def test_a_chain_is_found_though_its_folder_has_two_names(ask, tmp_path):
    """sbatch puts its own folder, without links, before a relative path."""
    (tmp_path / "disk/runs").mkdir(parents=True)
    (tmp_path / "home").symlink_to("disk")
    found = Fake(squeue=f"8|{tmp_path}/disk/runs/job.sbatch\n9|{tmp_path}/home/runs/job.sbatch")
    assert ask("7", found).pending_after(tmp_path / "home/runs/job.sbatch") == ["8", "9"]


def test_nothing_to_cancel_cancels_nothing(ask):
    fake = Fake()
    ask("7", fake).cancel([])
    assert fake.asked == []
    ask("7", fake).cancel(["8", "9"])
    assert fake.asked == [["scancel", "8", "9"]]


def test_a_controller_that_does_not_answer_is_asked_again(scontrol, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    scontrol(
        f"echo x >> {calls}\n[ $(wc -l < {calls}) -gt 2 ] && echo JobState=RUNNING && exit 0\n"
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2\nexit 1"
    )
    monkeypatch.setattr(client, "_PAUSE_SECONDS", 0.0)
    assert Scheduler("7").ended_by_slurm() is None
    assert calls.read_text().count("x") == 3


@pytest.mark.parametrize(
    "outage",
    [
        "Unable to contact slurm controller (connect failure)",
        "Slurm backup controller in standby mode",
        "Zero Bytes were transmitted or received",
        "Protocol authentication error",
    ],
)
def test_an_outage_of_minutes_is_outlasted(outage, scontrol, tmp_path, monkeypatch):
    """A second controller takes over after two minutes; the run would be given up."""
    calls = tmp_path / "calls"
    scontrol(f"echo x >> {calls}\n[ $(wc -l < {calls}) -gt 36 ] && exit 0\necho 'error: {outage}' >&2\nexit 1")
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    Scheduler("7").requeue()
    assert waits.count(client._PAUSE_SECONDS) == 36  # subprocess waits too


def test_but_not_for_ever(scontrol, monkeypatch):
    scontrol("echo 'error: Unable to contact slurm controller (connect failure)' >&2\nexit 1")
    now = [0.0]
    monkeypatch.setattr(client, "_given_up", set())
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    pause = client._PAUSE_SECONDS  # subprocess sleeps too
    monkeypatch.setattr(client.time, "sleep", lambda seconds: now.append(now.pop() + 15 * (seconds == pause)))
    with pytest.raises(SlurmError, match="Unable to contact"):
        Scheduler("7").ended_by_slurm()
    begun = now[0]
    assert 300 < begun < 900
    with pytest.raises(SlurmError, match="Unable to contact"):  # the job's last minutes are not spent twice
        Scheduler("7").requeue()
    assert now[0] - begun < 60


def test_a_refusal_is_told_at_once(scontrol, tmp_path, monkeypatch):
    scontrol("[ $1 = show ] && exit\necho 'Job is in transition' >&2\nexit 1")
    with pytest.raises(SlurmError, match="scontrol requeue: Job is in transition"):
        Scheduler("7").requeue()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(SlurmError, match="scontrol is not installed here"):
        Scheduler("7").requeue()


def test_another_job_at_work(scontrol, tmp_path, monkeypatch):
    states = "7) echo JobState=COMPLETED ;; 8_2) echo JobState=RUNNING ;;"
    scontrol(f"case $3 in {states} *) echo no such job >&2; exit 1 ;; esac")
    assert job_at_work(["6", "7", "8_2"]) == "8_2"
    assert job_at_work(["6", "7"]) is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))  # in a container
    assert job_at_work(["8_2"]) is None


@pytest.mark.parametrize(("afterwards", "at_work"), [("CANCELLED", None), ("RUNNING", "7")])
def test_a_job_that_is_ending_is_waited_for(afterwards, at_work, scontrol, tmp_path, monkeypatch):
    """Its processes may still save, and the next job of a chain would load an older checkpoint."""
    scontrol(
        f"echo >> {tmp_path}/asked\n"
        f"[ $(wc -l < {tmp_path}/asked) -gt 2 ] && echo JobState={afterwards} || echo JobState=COMPLETING"
    )
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    assert job_at_work(["7"]) == at_work and waits.count(client._PAUSE_SECONDS) == 2
