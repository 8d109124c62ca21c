"""What the batch script does at its end, with Slurm's commands faked on the PATH."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from jobs import job_settings

from plt_megatron.errors import AttemptFailed
from plt_megatron.launcher import finalize, in_job, records
from plt_megatron.launcher.finalize import finalize_job
from plt_megatron.launcher.job import load_settings, read_allocation, save_settings
from plt_megatron.launcher.records import Exit, Outcome, Records
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm import client

PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> {log}
case "$(basename "$0") $1" in
    "scontrol show") echo "JobState=$(cat {state}) ExcNodeList=(null)" ;;
    "scontrol requeue") [ ! -e {refuses} ] || {{ echo "Requeue is disabled" >&2; exit 1; }} ;;
    squeue*) [ ! -e {silent} ] || {{ rm {silent}; echo "Unable to contact slurm controller" >&2; exit 1; }}
        for job in $(cat {pending}); do echo "$job|{script}"; done ;;
esac
"""


class Job:
    """A run's folder, inside a faked job."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.log = folder / "run", folder / "log"
        self.state, self.pending, self.refuses = folder / "state", folder / "pending", folder / "refuses"
        (self.run / "logs").mkdir(parents=True)
        programs = folder / "bin"
        programs.mkdir()
        self.silent = folder / "silent"
        text = PROGRAM.format(script=self.run / "job.sbatch", **vars(self))
        for name in ("scontrol", "squeue", "scancel"):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.state.write_text("RUNNING\n")
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_NODELIST", "SLURM_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1"}.items():
            monkeypatch.setenv(name, value)
        self.settings()

    def settings(self, pending: str = "", **changes) -> None:
        """What the job was submitted with, and the jobs of its chain that wait behind it."""
        save_settings(job_settings(**({"requeue": True} | changes)), self.run)
        self.pending.write_text(pending)

    def ends(self, outcome: Outcome, status: int) -> int:
        """An attempt that ends so, and what the batch script's last line returns."""
        records = Records(self.run, read_allocation())
        records.end(records.begin(), outcome)
        return finalize_job(self.run, status)

    @property
    def asked(self) -> list[str]:
        """What has been asked of Slurm, besides questions."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if not line.startswith(("scontrol show", "squeue"))]

    def left_alone(self) -> bool:
        """Nothing is asked of Slurm, and nothing is given up."""
        return self.asked == [] and not (self.run / "why.txt").exists()


@pytest.fixture
def job(tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield Job(tmp_path, monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


FINISHED, SAVED = Outcome("finished", "done"), Outcome("preempted", "saved")


@pytest.mark.parametrize(
    ("settings", "pending", "outcome", "status", "asked"),
    [
        ({}, "", FINISHED, 0, []),
        ({"chain": 3, "requeue": False}, "8 9", FINISHED, 0, ["scancel 8 9"]),  # the rest is not needed
        ({}, "", SAVED, 75, ["scontrol requeue 7"]),
        ({"chain": 3}, "8", SAVED, 75, []),  # the chain goes on before a requeue
        ({"chain": 3}, "", SAVED, 75, ["scontrol requeue 7"]),  # at its end
        ({"chain": 3}, "8", Outcome("preempted", "stopped by a person", retry=False), 75, ["scancel 8"]),
    ],
)
def test_what_follows_when_nothing_is_wrong(job, settings, pending, outcome, status, asked):
    job.settings(pending, **settings)
    assert (job.ends(outcome, status), job.asked) == (status, asked) and not (job.run / "why.txt").exists()


def test_neither_requeue_nor_chain(job, capsys):
    job.settings(requeue=False)
    assert job.ends(SAVED, 75) == 75 and job.left_alone()
    assert f"sbatch {job.run / 'job.sbatch'}" in capsys.readouterr().out
    assert job.ends(Outcome("node_failed", "n2 is lost"), 77) == 77
    assert (job.run / "why.txt").read_text().startswith("n2 is lost; not continued: no --requeue")


PREEMPTED = "RUNNING Requeue=1 PreemptTime=2026-11-25T09:25:46 Partition=main PreemptMode=REQUEUE"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", PREEMPTED])
def test_a_job_that_slurm_has_ended_or_requeues_is_left_alone(job, state):
    """Cancelled by a person, who does not want it back, or requeued already."""
    job.state.write_text(f"{state}\n")
    assert job.ends(SAVED, 75) == 75 and job.left_alone()


def test_a_controller_that_is_away_does_not_end_a_chain(job, monkeypatch):
    """Whether a job follows is not known then: none is cancelled."""
    monkeypatch.setattr(client, "_TRIES", 1)
    job.settings("8 9", chain=3, requeue=False)
    job.silent.touch()
    assert job.ends(Outcome("failed", "rank 3 has crashed"), 1) == 1 and job.left_alone()


@pytest.mark.parametrize("is_away", [False, True], ids=["", "the controller is away"])
def test_where_requeueing_is_forbidden_a_chain_outlasts_a_bad_node(is_away, job, monkeypatch):
    monkeypatch.setattr(client, "_TRIES", 1)
    job.settings("8 9", chain=3, requeue=False)
    job.refuses.touch()
    if is_away:
        job.silent.touch()
    assert job.ends(Outcome("node_failed", "n2: no space", bad_nodes={"n2": "no space"}), 76) == 76
    assert job.asked == ["scontrol requeue 7"] and not (job.run / "why.txt").exists()


def test_nodes_that_left_a_killed_first_launcher_are_not_bad(job, tmp_path, monkeypatch):
    output = "srun: error: n1: task 0: Killed\nsrun: error: n2: task 1: Exited with exit code 77\n"
    assert outcome(job, 137, output, monkeypatch, tmp_path)[0] == 137 and job.asked == ["scontrol requeue 7"]
    end = RunFolder(job.run).attempts()[-1]
    assert (end["status"], end["reason"], end["bad_nodes"]) == ("node_failed", "the first node's launcher is gone", {})


def test_a_bad_node_is_left_out_even_without_requeue(job):
    job.settings(requeue=False)
    assert job.ends(Outcome("node_failed", "n2: no space", bad_nodes={"n2": "no space"}), 76) == 76
    assert job.asked == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n2"]


def test_a_real_failure_stops_the_chain_and_says_why(job):
    job.settings("8 9", chain=3)
    failure = Exit(3, "n2", 2, ["error: gone"])
    assert job.ends(Outcome("failed", "rank 3 says gone", retry=False, failure=failure), 2) == 2
    assert job.asked == ["scancel 8 9"]
    why = (job.run / "why.txt").read_text()
    assert why.startswith("rank 3 says gone\n") and "error: gone" in why and "last complete checkpoint: none" in why
    assert RunFolder(job.run).attempts()[-1]["event"] == "stop"


def test_a_users_error_that_no_disk_took_is_not_tried_again(job, monkeypatch):
    """The attempt before, which was saved, must not be taken for this one."""
    earlier = Records(job.run, read_allocation())
    earlier.end(earlier.begin(), SAVED)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(records.json_lines, "append", Mock(side_effect=full))
    assert job.ends(Outcome("failed", "no tokenizer", retry=False), 2) == 2
    assert job.asked == [] and "attempt 2" in (job.run / "why.txt").read_text()


def test_a_disk_that_does_not_answer_for_a_while_takes_no_requeue_away(job, monkeypatch):
    """Neither the step that the end is recorded with nor the record itself can be read at first."""
    away = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(records, "latest_step", Mock(side_effect=away))
        own = Records(job.run, read_allocation())
        own.end(own.begin(), SAVED)
    assert RunFolder(job.run).attempts()[-1]["checkpoint"] is None
    read = Records.events
    monkeypatch.setattr(finalize, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Records, "events", Mock(side_effect=[away, away, *[read(own)] * 9]))
    assert finalize_job(job.run, 75) == 75 and job.asked == ["scontrol requeue 7"]


@pytest.mark.parametrize(
    "away", [OSError(errno.ESTALE, "Stale file handle", "runs/x"), AttemptFailed("runs/x")], ids=repr
)
def test_a_launcher_without_its_disk_has_failed_and_is_not_given_up(job, monkeypatch, away):
    monkeypatch.setattr(in_job, "launch_node", Mock(side_effect=away))
    monkeypatch.setattr(sys, "argv", ["in_job.py", "node", str(job.run)])
    assert in_job.main() == 1
    monkeypatch.setattr(finalize, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(finalize, "load_settings", Mock(side_effect=[away, away, load_settings(job.run)]))
    assert finalize_job(job.run, 1) == 1 and job.asked == ["scontrol requeue 7"]


def test_a_requeue_that_is_refused_is_a_reason(job):
    job.refuses.touch()
    assert job.ends(SAVED, 75) == 75
    assert "could not be requeued: scontrol requeue: Requeue is disabled" in (job.run / "why.txt").read_text()


def test_launchers_that_left_no_word(job):
    """Killed together with srun: only the status is left."""
    records = Records(job.run, read_allocation())
    records.begin()
    assert finalize_job(job.run, 137) == 137
    end = RunFolder(job.run).attempts()[-1]
    assert (end["event"], end["status"], end["attempt"]) == ("end", "failed", 1) and "status 137" in end["reason"]
    assert job.asked == ["scontrol requeue 7"]
    assert finalize_job(job.run, 77) == 77


def test_launchers_that_left_no_word_leave_another_jobs_attempt_alone(job, monkeypatch):
    """Its node was lost: it gets an end of its own."""
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    Records(job.run, read_allocation()).begin()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert finalize_job(job.run, 2) == 2
    ends = [event for event in RunFolder(job.run).attempts() if event["event"] == "end"]
    assert [(end["attempt"], end["job_id"], end["status"]) for end in ends] == [(1, "6", "killed"), (2, "7", "failed")]


def test_a_run_that_is_another_jobs(job):
    Records(job.run, read_allocation()).begin()
    before = RunFolder(job.run).attempts()
    assert finalize_job(job.run, 78) == 78
    assert RunFolder(job.run).attempts() == before and job.left_alone()


def test_launchers_that_could_not_start(job):
    assert finalize_job(job.run, 2) == 2
    assert job.asked == []
    assert "the launchers did not start" in (job.run / "why.txt").read_text()


def outcome(job, status: int, output: str, monkeypatch, tmp_path) -> tuple[int, str]:
    """The job's status, and the reason that it was given up for, when its output is this."""
    log = tmp_path / "slurm-7.out"
    log.write_text(output)
    monkeypatch.setattr(finalize, "own_output", lambda: log)
    ended = finalize_job(job.run, status)
    stop = RunFolder(job.run).attempts()[-1]
    return ended, stop["reason"].replace(str(log), "LOG") if stop["event"] == "stop" else ""


@pytest.mark.parametrize(
    ("stopped_at", "output", "reason"),
    [
        ("exit 3", "", "the job's setup failed at `exit 3`; fix"),
        ("", "", "the job's setup failed; fix"),
        ("cd $A || exit", "x\n/spool/slurm_script: line 51: cd: /a: No such file\n\n",
         "the job's setup failed at `cd $A || exit`: cd: /a: No such file; see LOG; fix"),
    ],
)  # fmt: skip
def test_a_setup_that_failed_is_not_tried_again(job, monkeypatch, tmp_path, stopped_at, output, reason):
    """Though the job may be requeued: the profile is the user's."""
    job.settings("8", chain=3)
    monkeypatch.setenv("PLT_SETUP_FAILED", stopped_at)
    ended, said = outcome(job, 2, output, monkeypatch, tmp_path)
    assert (ended, job.asked) == (2, ["scancel 8"]) and said.startswith(reason) and "sbatch " not in said
    why = (job.run / "why.txt").read_text()
    assert ("job's output" in why) == bool(output) and str(job.run / "job.sbatch") in why.splitlines()[0]


@pytest.mark.parametrize(
    ("status", "output", "reason"),
    [
        (127, "slurm_script: line 9: srun: not found\n", "the launchers did not start: srun: not found; see LOG"),
        (2, "error: bad\nsrun: error: node1: task 0: Exited with exit code 2\n", "the launchers did not start: bad;"),
        (2, "x: no y\nsrun: Terminating StepId=7.0\n", "the launchers did not start: x: no y; see LOG"),
        (2, "", "the launchers did not start"),
        (1, "Traceback\nImportError: no x\nmore\n", "the launchers ended with status 1, without a record: Imp"),
    ],
)  # fmt: skip
def test_launchers_that_did_not_start_are_told_by_the_jobs_output(job, monkeypatch, tmp_path, status, output, reason):
    job.settings(requeue=False)
    ended, said = outcome(job, status, output, monkeypatch, tmp_path)
    assert ended == status and said.startswith(reason)
    lines = output.removeprefix("slurm_script: line 9: ").splitlines()
    assert all(f"    {line}\n" in (job.run / "why.txt").read_text() for line in lines)


@pytest.mark.parametrize("others", ["node", "all", "hundreds"])
def test_a_node_whose_launcher_left_the_others_is_left_out(job, monkeypatch, tmp_path, others):
    """srun then kills the others; lines of a start before a requeue say nothing of this one."""
    before = "srun: error: n1: task 0: Exited with exit code 75\n"
    left = "n[1-2]: tasks 0-1" if others == "all" else "n2: task 1"
    monkeypatch.setenv("PLT_OUTPUT_BEGINS", str(len(before)))
    killed = "srun: error: n1: task 0: Killed\n" * (900 if others == "hundreds" else 1)
    said = f"{before}srun: error: {left}: Exited with exit code 127\n{killed}"
    assert outcome(job, 137, said, monkeypatch, tmp_path)[0] == 137
    end = RunFolder(job.run).attempts()[1]
    if others == "all":
        assert end["status"] == "failed" and job.asked == ["scontrol requeue 7"]
        return
    assert end["status"] == "node_failed" and end["reason"].startswith("n2: its launcher ended with status 127")
    assert job.asked == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n2"]


def test_a_job_told_to_leave_before_it_began_is_preempted(job):
    assert finalize_job(job.run, 75) == 75
    assert RunFolder(job.run).attempts()[-1]["status"] == "preempted" and job.asked == ["scontrol requeue 7"]


def test_what_the_setup_passed_over_is_in_the_records(job, monkeypatch):
    monkeypatch.setenv("PLT_SETUP_WARNINGS", "one\ntwo")
    job.ends(Outcome("failed", "r", retry=False), 2)
    assert RunFolder(job.run).attempts()[0]["warnings"] == ["one", "two"]
    assert "\nwarning: one\nwarning: two\n" in (job.run / "why.txt").read_text()


def test_a_disk_without_room_for_why(job, capfd):
    """The job's output says it instead, and does not send its reader to a file that is not there."""
    (job.run / "why.txt" / "in the way").mkdir(parents=True)
    job.settings(requeue=False)
    records = Records(job.run, read_allocation())
    records.end(1, Outcome("failed", "no space", retry=False))
    assert finalize_job(job.run, 2) == 2
    said, errors = capfd.readouterr()
    assert "given up: no space\n" in said and "see " not in said
    assert "why.txt cannot be written" in errors and "last complete checkpoint: none" in errors


def test_a_member_of_an_array_names_itself(job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert job.ends(SAVED, 75) == 75
    assert job.asked == ["scontrol requeue 7_2"]
