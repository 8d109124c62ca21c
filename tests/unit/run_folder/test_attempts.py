"""What exit statuses mean, as numbers and in words."""

from __future__ import annotations

from plt_megatron.run_folder.attempts import ExitStatus, describe_exit, last_attempt, read_events, unended
from plt_megatron.run_folder.status import read_run_status


def test_exit_statuses_are_what_job_scripts_and_wrappers_rely_on():
    assert {status.name: int(status) for status in ExitStatus} == {
        "FINISHED": 0,
        "FAILED": 1,
        "USER_ERROR": 2,
        "PREEMPTED": 75,
        "BAD_NODE": 76,
        "NODE_LOST": 77,
        "RUN_BUSY": 78,
    }
    assert f"ended with status {ExitStatus.PREEMPTED}" == "ended with status 75"


def test_exits_in_words():
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-9) == "was killed by SIGKILL (out of memory?)"
    assert describe_exit(-7) == "was killed by SIGBUS"
    assert describe_exit(-63).startswith("was killed by ")


def test_lines_that_are_no_events_are_left_out(tmp_path):
    broken = ['{"event": "start"}', '{"event": "end", "attempt": "2"}', '{"event": [1]}', "[" * 100_000, '{"a":']
    events = [
        '{"event": "start", "attempt": 1}',
        *broken,
        '{"event": "again", "attempt": null}',
        '{"event": "start", "attempt": 2}',
    ]
    (tmp_path / "attempts.jsonl").write_text("\n".join(events) + "\n")
    found = read_events(tmp_path / "attempts.jsonl")
    assert [event["event"] for event in found] == ["start", "again", "start"]
    assert last_attempt(found) == 2 and len(unended(found)) == 2


def test_the_end_that_late_launchers_record_replaces_the_batch_scripts(tmp_path):
    """Their srun was killed; they went on and finished the run."""
    lines = [
        '{"event": "start", "attempt": 1, "job_id": "7"}',
        '{"event": "end", "attempt": 1, "job_id": "7", "status": "killed", "reason": "no record"}',
        '{"event": "start", "attempt": 2, "job_id": "7"}',
        '{"event": "end", "attempt": 2, "job_id": "7", "status": "failed", "reason": "srun", "time": 5}',
        '{"event": "stop", "attempt": 2, "job_id": "7", "reason": "gave up"}',
        '{"event": "end", "attempt": 2, "job_id": "7", "status": "finished", "reason": "done", "step": 4, "time": 9}',
    ]
    (tmp_path / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    found = read_events(tmp_path / "attempts.jsonl")
    assert [event["event"] for event in found] == ["start", "end", "start", "end", "stop"]
    status = read_run_status(tmp_path)
    assert (status.attempts, status.last_status, status.step) == (2, "finished", 4)
    assert len(status.restarts) == 1 and "attempt 1" in status.restarts[0]
