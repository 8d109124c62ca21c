"""What is asked of Slurm, with its commands faked; tests/slurm asks a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from plt_megatron.slurm.in_job import scheduler
from plt_megatron.slurm.in_job.scheduler import Scheduler, SchedulerError


class Fake:
    def __init__(self, **answers: str) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, command) -> str:
        self.asked.append(list(command))
        return self.answers.get(command[0] if command[0] != "scontrol" else command[1], "")


def show(state: str = "RUNNING", excluded: str = "(null)") -> str:
    return f"JobId=7 JobName=x\n   JobState={state} Reason=None\n   ReqNodeList=(null) ExcNodeList={excluded}\n"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT", "PREEMPTED"])
def test_a_job_that_slurm_has_ended(state):
    assert Scheduler("7", Fake(show=show(state))).ended_by_slurm() == state


@pytest.mark.parametrize("state", ["RUNNING", "SIGNALING", "SUSPENDED"])
def test_a_job_that_goes_on(state):
    assert Scheduler("7", Fake(show=show(state))).ended_by_slurm() is None


def test_requeue():
    fake = Fake()
    Scheduler("7_2", fake).requeue()
    assert fake.asked == [["scontrol", "requeue", "7_2"]]


def test_nodes_are_excluded_besides_those_that_were():
    fake = Fake(show=show(excluded="n[1-2]"))
    Scheduler("7", fake).requeue(["n5", "n2"])
    assert fake.asked[1:] == [["scontrol", "requeue", "7"], ["scontrol", "update", "JobId=7", "ExcNodeList=n1,n2,n5"]]


def test_the_rest_of_a_chain_runs_the_same_script():
    script = Path("/runs/a b/job.sbatch")
    lines = [
        "6|/runs/a b/job.sbatch",
        "7|/runs/a b/job.sbatch",
        "8|/runs/a b/job.sbatch.old",
        "9|/runs/a b/job.sbatch -x",
    ]
    assert Scheduler("7", Fake(squeue="\n".join(lines))).pending_after(script) == ["6", "9"]


def test_nothing_to_cancel_cancels_nothing():
    fake = Fake()
    Scheduler("7", fake).cancel([])
    assert fake.asked == []
    Scheduler("7", fake).cancel(["8", "9"])
    assert fake.asked == [["scancel", "8", "9"]]


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    program = tmp_path / "scontrol"
    program.write_text(
        f"#!/bin/sh\necho x >> {calls}\n[ $(wc -l < {calls}) -gt 2 ] && echo JobState=RUNNING && exit 0\n"
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(scheduler, "_PAUSE_SECONDS", 0.0)
    assert Scheduler("7").ended_by_slurm() is None
    assert calls.read_text().count("x") == 3


def test_a_refusal_is_told_at_once(tmp_path, monkeypatch):
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho 'Job is in transition' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SchedulerError, match="scontrol requeue: Job is in transition"):
        Scheduler("7").requeue()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(SchedulerError, match="scontrol is not there"):
        Scheduler("7").requeue()
