"""Uploads beside a run: when they begin, what fails, what the next job finds.

The process is a stand-in that uploads when it is asked how it is; whole runs upload in tests/distributed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.storage import run_uploads
from plt_megatron.storage.run_uploads import RunUploads
from plt_megatron.train.callbacks import exports, uploads
from tests.running import wait_for
from tests.unit.storage.test_upload_copies import an_export
from tests.unit.storage.test_upload_runs import a_run as a_run_folder
from tests.unit.storage.test_upload_runs import saved, steps
from tests.unit.train.callbacks.a_run import a_run, finish


class StandIn:
    """`plt upload RUN --waiting`, which works when asked how it is, unless it is `stuck`."""

    started: list[StandIn] = []
    stuck = False
    dies = 0  # with this status

    def __init__(self, command: list[str], log: Path) -> None:
        assert command[0] == "upload" and command[2:] == ["--waiting"]
        self.folder, self.ended, self.quiet = RunFolder(command[1]), False, 0.0
        StandIn.started.append(self)

    def poll(self) -> int | None:
        if StandIn.dies:
            return StandIn.dies
        if StandIn.stuck:
            return None
        return 0 if RunUploads(self.folder.config(), self.folder, lambda line: None).work() else 1

    def last_words(self) -> str:
        return "it has no credentials"

    def quiet_seconds(self) -> float:
        return self.quiet

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def run(tmp_path, monkeypatch) -> Any:
    """Of ten steps, uploading to `there`."""
    monkeypatch.setattr(uploads, "BesideProcess", StandIn)
    monkeypatch.setattr(StandIn, "started", [])
    for name in ("stuck", "dies"):
        monkeypatch.setattr(StandIn, name, False)
    folder = a_run_folder(tmp_path)
    run = a_run(folder.path)
    run.config = folder.config()
    run.last_step = 10
    run.records = []
    run.report = run.records.append
    return run


@pytest.fixture
def callback(run) -> uploads.Uploads:
    return uploads.Uploads(run)


def there(run: Any, kind: str = "checkpoints") -> list[int]:
    return steps(run.folder.path.parents[1] / "there" / "mine" / kind)


def save(run: Any, callback: Any, step: int) -> Path:
    run.clock.step, run.clock.tokens = step, 100 * step
    checkpoint = saved(run.folder, step)
    callback.on_save(checkpoint)
    return checkpoint


def fail(monkeypatch: Any) -> None:
    down = UserError("s3://bucket: the network is down")
    monkeypatch.setattr(run_uploads, "upload", Mock(side_effect=down))


def test_an_upload_that_cannot_be_started_is_tried_when_something_is_added(run, callback, monkeypatch):
    left = run.folder.uploading / "checkpoints" / "step_00000002.tmp"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    callback.on_start()
    assert not left.exists()
    with monkeypatch.context() as patched:
        patched.setattr(uploads, "BesideProcess", Mock(side_effect=BlockingIOError(11, "temporarily unavailable")))
        save(run, callback, 4)
        callback.after_step()
    (said,) = run.said
    assert "the upload of 1 checkpoint failed" in said and "temporarily unavailable" in said
    save(run, callback, 6)
    callback.after_step()
    assert there(run) == [6]


def test_exports_and_checkpoints_are_uploaded_while_the_run_goes_on(run, callback):
    callback.on_start()
    assert StandIn.started == [], "there is nothing to do"
    StandIn.stuck = True
    shutil.rmtree(save(run, callback, 4))
    callback.on_export(an_export(run.folder.exports / "step_00000004"))
    callback.after_step()
    assert len(StandIn.started) == 1 and there(run) == []
    StandIn.stuck = False
    run.clock.step, run.clock.tokens = 6, 600
    callback.after_step()
    assert there(run) == there(run, "exports") == [4]
    target = f"file://{run.folder.path.parents[1]}/there/mine"
    assert run.said == [f"uploaded {target}/{kind}/step_00000004" for kind in ("exports", "checkpoints")]
    assert [(record["kind"], record["what"], record["step"], record["of_step"]) for record in run.records] == [
        ("upload", "export", 6, 4),
        ("upload", "checkpoint", 6, 4),
    ]
    assert run.records[0]["tokens"] == 600 and run.records[0]["bytes"] == 4006


def test_at_the_end_all_that_waits_is_uploaded(run, callback):
    save(run, callback, 10)
    callback.on_export(an_export(run.folder.exports / "step_00000010"))
    finish(callback)
    assert there(run) == there(run, "exports") == [10]


def test_what_fails_is_a_warning_and_is_tried_again_with_the_next_and_at_the_end(run, callback, monkeypatch):
    callback.on_start()
    with monkeypatch.context() as patch:
        fail(patch)
        save(run, callback, 2)
        callback.after_step()
        callback.after_step()
        assert len(StandIn.started) == 1, "not in every step"
        assert run.said == ["warning: the upload of the checkpoint of step 2 failed: s3://bucket: the network is down"]
        assert run.records[0]["error"] == "s3://bucket: the network is down"
        save(run, callback, 4)
        callback.after_step()
        assert len(StandIn.started) == 2 and len(run.records) == 2
    StandIn.stuck = True
    run.clock.step = 10
    assert callback.is_working() and there(run) == []
    StandIn.stuck = False
    finish(callback)
    assert there(run) == [4], "the one of step 2 was superseded"
    assert "waiting for the upload of 1 checkpoint" in run.said


def test_a_run_that_is_stopped_while_it_waits_warns_of_nothing(run, callback):
    """What is under way has not failed; the next job goes on with it."""
    StandIn.stuck = True
    save(run, callback, 10)
    assert callback.is_working()
    callback.on_end()
    assert run.said == ["waiting for the upload of 1 checkpoint"]


def test_at_the_end_what_cannot_be_uploaded_is_left_to_the_command(run, callback, monkeypatch):
    fail(monkeypatch)
    save(run, callback, 10)
    finish(callback)
    assert run.said[-1] == f"warning: 1 checkpoint could not be uploaded; retry with plt upload {run.folder.path}"


@pytest.mark.parametrize("status", [1, 2, -9])  # a Python exception's is 1
def test_a_process_that_dies_or_does_not_move_is_reported_once(run, callback, monkeypatch, status):
    StandIn.dies = status
    save(run, callback, 2)
    for _ in range(3):
        callback.after_step()
    assert run.said == ["warning: the upload of 1 checkpoint failed: it has no credentials"]
    StandIn.dies, StandIn.stuck = 0, True
    save(run, callback, 4)
    monkeypatch.setattr(uploads, "_LOOK_S", 0.0)
    callback.after_step()
    assert len(StandIn.started) == 2 and not StandIn.started[1].ended
    StandIn.started[1].quiet = 60 * run.config.parallel.distributed_timeout_minutes + 1
    callback.after_step()
    assert StandIn.started[1].ended and "no progress for 601 seconds" in run.said[-1]
    StandIn.stuck = False
    callback.on_export(an_export(run.folder.exports / "step_00000004"))
    callback.after_step()
    assert there(run) == there(run, "exports") == [4]


def test_a_job_that_goes_on_finishes_what_the_one_before_has_left(run, callback):
    StandIn.stuck = True
    save(run, callback, 4)
    callback.on_end()  # stopped at step 4: nobody waits
    callback.close()
    assert StandIn.started[0].ended and there(run) == []
    StandIn.stuck = False
    again = uploads.Uploads(run)
    again.on_start()
    again.after_step()
    assert there(run) == [4] and len(run.said) == 1


def test_what_is_rolled_back_or_trained_again_gives_way(run, callback):
    StandIn.stuck = True
    save(run, callback, 2)
    shutil.rmtree(save(run, callback, 4))
    run.clock.step = 2
    callback.on_rollback({})
    assert StandIn.started[0].ended
    for _ in range(2):
        shutil.rmtree(run.folder.checkpoints / "step_00000002")
        save(run, callback, 2)
    assert StandIn.started[1].ended, "it may have been sending the first one"
    assert not (run.folder.uploading / "checkpoints" / "step_00000004").exists()
    assert [path.name for path in (run.folder.uploading / "checkpoints").iterdir()] == ["step_00000002"]


def test_where_no_links_can_be_made_it_says_so(run, callback, monkeypatch):
    monkeypatch.setattr("os.link", Mock(side_effect=OSError(28, "No space left on device")))
    save(run, callback, 4)
    assert len(run.said) == 1 and "is not uploaded" in run.said[0] and "No space" in run.said[0]
    assert "None" not in run.said[0]


def test_a_process_beside_training_is_no_rank_and_is_seen_to_move(tmp_path, monkeypatch):
    """A real one, of a `plt` that reads a file when it is told to; its code is the run's, not the working folder's."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(exports, "python_path", lambda: str(tmp_path / "snapshot"))
    (tmp_path / "checkout/plt_megatron").mkdir(parents=True)
    (tmp_path / "checkout/plt_megatron/__init__.py").write_text("raise ImportError('half edited')\n")
    monkeypatch.chdir(tmp_path / "checkout")
    package = tmp_path / "snapshot/plt_megatron"
    (package / "runtime").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "runtime/local_processes.py").write_text("def die_with_parent(): ...\n")
    (package / "commands.py").write_text(
        "import os, sys\ndef main():\n assert 'RANK' not in os.environ\n print('ready', file=sys.stderr, flush=True)\n"
        " os.open(sys.argv[2], os.O_RDONLY)\n open(__file__).read()\n os.open(sys.argv[3], os.O_RDONLY)\n"
    )
    # Two pipes: a second open of the first could succeed before its writer has closed it.
    fifo, never = tmp_path / "fifo", tmp_path / "never"
    subprocess.run(["mkfifo", fifo, never], check=True)
    process = exports.BesideProcess(["mover", str(fifo), str(never)], tmp_path / "log")
    wait_for((tmp_path / "log").read_text)
    assert process.poll() is None, process.last_words()
    while (quiet := process.quiet_seconds()) < 0.05:  # it may be on its way from there to the pipe
        time.sleep(0.01)
    fifo.open("w").close()
    while process.quiet_seconds() >= quiet and process.poll() is None:
        time.sleep(0.001)
    assert process.poll() is None, "it has been seen to move, not to end"
    process.end()
    assert process.poll() != 0


def test_a_time_limit_longer_than_python_can_wait_is_a_day(run, monkeypatch):
    run.config.parallel.distributed_timeout_minutes = 1e6
    checked = Mock(return_value=Mock(returncode=0, stderr=""))
    monkeypatch.setattr(subprocess, "run", checked)
    uploads._check(run.config)
    assert checked.call_args.kwargs["timeout"] == 24 * 3600
