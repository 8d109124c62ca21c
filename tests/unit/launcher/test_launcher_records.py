"""attempts.jsonl, why.txt and the progress that a run's folder shows."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from pathlib import Path
from unittest.mock import Mock

import pytest

from plt_megatron.launcher import records
from plt_megatron.launcher.job import Allocation
from plt_megatron.launcher.records import Exit, LogFile, Outcome, Records, stamp
from plt_megatron.run_folder.attempts import job_seconds
from plt_megatron.run_folder.checkpoints import latest_of_full_size, latest_step
from plt_megatron.run_folder.folder import RunFolder


def allocation(job: int = 7, restart: int = 0) -> Allocation:
    return Allocation(job, str(job), restart, ("a", "b"), 0)


def write_checkpoint(run: Path, step: int, whole: bool = True) -> Path:
    path = run / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"x" * 10)
    size = 10 if whole else 11
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": {"weights": {"bytes": size, "sha256": "?"}}}))
    return path


def test_an_attempt_from_start_to_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "kind": "train"}\n{"step": 5, "kind": "train"}\n{"ste')
    write_checkpoint(tmp_path, 4)
    run = Records(tmp_path, allocation())
    assert run.begin() == 1
    run.end(1, Outcome("failed", "why", failure=Exit(3, "b", 1, ["last", "words"])))
    start, end = RunFolder(tmp_path).attempts()
    assert (start["event"], start["attempt"], start["job_id"], start["nodes"]) == ("start", 1, "7", ["a", "b"])
    assert (end["event"], end["status"], end["step"], end["checkpoint"]) == ("end", "failed", 5, 4)
    assert end["failure"] == {"rank": 3, "node": "b", "exit": "exited with status 1", "lines": ["last", "words"]}
    assert end["time"] >= start["time"] > 1e9
    assert run.of_this_start() == end
    assert run.begin() == 2 and run.of_this_start() is None, "a new attempt has no end yet"


def test_the_end_of_another_start_is_not_this_ones(tmp_path):
    earlier = Records(tmp_path, allocation(7, 0))
    earlier.end(earlier.begin(), Outcome("preempted", ""))
    assert Records(tmp_path, allocation(7, 1)).of_this_start() is None
    assert Records(tmp_path, allocation(8, 0)).of_this_start() is None


def test_an_attempt_that_left_no_word_is_ended_at_the_next_start(tmp_path):
    Records(tmp_path, allocation(7, 0)).begin()
    assert Records(tmp_path, allocation(7, 1)).begin() == 2
    start, end, again = RunFolder(tmp_path).attempts()
    assert (end["status"], end["attempt"], end["job_id"], end["restart_count"]) == ("killed", 1, "7", 0)
    assert (again["event"], again["attempt"], again["restart_count"]) == ("start", 2, 1)


@pytest.mark.parametrize("logged", [True, False])
def test_time_in_the_queue_is_not_a_lost_attempts(tmp_path, monkeypatch, logged):
    """A node is lost after ten minutes, and the job starts again after three days."""
    monkeypatch.setattr(records.time, "time", lambda: now)
    now = 1e9
    Records(tmp_path, allocation(7, 0)).begin()
    if logged:
        (tmp_path / "metrics.jsonl").write_text('{"step": 5, "kind": "train"}\n')
        os.utime(tmp_path / "metrics.jsonl", (now + 600, now + 600))
    now += 3 * 86400
    run = Records(tmp_path, allocation(7, 1))
    attempt = run.begin()
    now += 600
    run.end(attempt, Outcome("finished", ""))
    assert job_seconds(run.events()) == (1200 if logged else 600)


def test_a_lost_attempt_without_a_time_ends_as_the_others(tmp_path):
    (tmp_path / "attempts.jsonl").write_text(
        '{"event": "start", "attempt": 1}\n{"event": "start", "attempt": 2, "time": "x"}\n'
    )
    run = Records(tmp_path, allocation())
    assert run.begin() == 3 and [event["event"] for event in run.events()] == ["start", "start", "end", "end", "start"]
    assert job_seconds(run.events()) == 0


def test_torn_lines_are_passed_over(tmp_path):
    Records(tmp_path, allocation()).begin()
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "end", "att\n[1]\n"x"\n{"event": "other"}\n')
    assert [event["event"] for event in RunFolder(tmp_path).attempts()] == ["start"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_loses_the_note_and_nothing_else(tmp_path, capsys):
    (tmp_path / "attempts.jsonl").symlink_to("/dev/full")
    Records(tmp_path, allocation()).end(1, Outcome("finished", "done"))
    error = capsys.readouterr().err
    assert "No space left on device" in error and '"finished"' in error


def test_what_a_full_disk_did_not_take_still_counts(tmp_path, monkeypatch):
    run = Records(tmp_path, allocation())
    run.begin()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(records.json_lines, "append", Mock(side_effect=full))
    run.end(1, Outcome("failed", "why", retry=False))
    assert run.of_this_start()["status"] == "failed" and len(RunFolder(tmp_path).attempts()) == 1
    assert run.begin() == 2 and [event["event"] for event in run.events()] == ["start", "end", "start"]


@pytest.mark.parametrize(
    ("text", "step"),
    [("", 0), ('{"step": 3}\n', 3), ('{"step": 3}\n{"step": 4}', 3), ('{"step": 3}\n{"st\n', 3), ("x\n", 0)]
    + [('{"step": 9}\n{"kind": "evaluation", "step": 4}\n', 9)],
)
def test_the_last_step(tmp_path, text, step):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert RunFolder(tmp_path).last_step() == step


def test_the_last_step_of_a_long_file(tmp_path):
    lines = [json.dumps({"step": step, "padding": "x" * 5000}) for step in range(100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert RunFolder(tmp_path).last_step() == 99


def test_nothing_there_yet(tmp_path):
    assert RunFolder(tmp_path).last_step() == latest_step(tmp_path) == 0
    assert RunFolder(tmp_path).attempts() == [] and latest_of_full_size(tmp_path) is None


def test_why_names_rank_lines_and_the_last_whole_checkpoint(tmp_path):
    whole = write_checkpoint(tmp_path, 4)
    write_checkpoint(tmp_path, 6, whole=False)
    run = Records(tmp_path, allocation())
    run.end(run.begin(), Outcome("failed", "r", failure=Exit(3, "b", -7, ["some", "line"])))
    lines = records.describe_end(RunFolder(tmp_path), "it broke", run.of_this_start()).splitlines()
    assert lines[0] == "it broke"
    assert "attempt 1, job 7, on a, b: failed" in lines
    assert f"last complete checkpoint: {whole}" in lines
    assert "rank 3 on b was killed by SIGBUS; its last lines:" in lines and "    line" in lines


def test_checkpoints_on_a_file_system_that_is_not_mounted_are_unknown(tmp_path, capsys):
    (tmp_path / "checkpoints").symlink_to("/scratch/not/mounted")
    run = Records(tmp_path, allocation())
    run.end(run.begin(), Outcome("failed", "r"))
    assert run.of_this_start()["checkpoint"] is None and "/scratch/not/mounted" in capsys.readouterr().err
    why = records.describe_end(RunFolder(tmp_path), "it broke", run.of_this_start())
    assert re.search(r"^last complete checkpoint: .*/scratch/not/mounted", why, re.MULTILINE)


def test_an_old_why_does_not_stay_when_the_run_goes_on(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "why.txt").write_text("old\n")
    assert Records(tmp_path, allocation()).begin() == 1
    assert not (tmp_path / "why.txt").exists()
    assert (tmp_path / "logs" / "why-before-attempt-1.txt").read_text() == "old\n"


# Logs that survive a full disk.


def test_lines_are_appended(tmp_path):
    path = tmp_path / "logs" / "rank.log"
    LogFile(path).write(["a", "b"])
    LogFile(path).write(["c \ud800"])  # what no encoding has is replaced
    LogFile(path).write([])
    assert path.read_text() == "a\nb\nc ?\n"


def test_a_line_says_which_attempt_and_who():
    assert stamp(3, "rank 7", "text").endswith(" attempt 3 rank 7: text")


def test_lines_that_cannot_be_written_are_counted(tmp_path):
    path = tmp_path / "logs" / "rank.log"
    path.parent.touch()  # a file where the folder should be
    log = LogFile(path)
    log.write(["a", "b"])
    assert log.lost == 2
    path.parent.unlink()
    log.write(["c"])
    assert "2 lines are missing here" in path.read_text() and path.read_text().endswith("c\n")
    assert log.lost == 0


def test_each_line_that_is_lost_is_counted_once(tmp_path):
    path = tmp_path / "logs" / "rank.log"
    path.parent.touch()
    log = LogFile(path)
    for text in "abc":
        log.write([text])
    assert log.lost == 3
    path.parent.unlink()
    log.write(["d"])
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))  # Python ignores SIGXFSZ
    try:
        log.write(["one", "two", "three"])
        assert log.lost == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    log.write(["e"])
    assert re.search("\nd\none\nt\n.* 2 lines are missing here.*\ne\n$", path.read_text())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(tmp_path):
    (tmp_path / "rank.log").symlink_to("/dev/full")
    log = LogFile(tmp_path / "rank.log")
    log.write(["a"])
    assert log.lost == 1
