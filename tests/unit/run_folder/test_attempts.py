"""What exit statuses mean, as numbers and in words."""

from __future__ import annotations

from plt_megatron.run_folder.attempts import ExitStatus, describe_exit


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
