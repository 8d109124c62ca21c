"""The queue of exports, with a stand-in for the exporting process; whole runs export in tests/distributed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from plt_megatron.config.schema import EvaluationConfig, ExportsConfig
from plt_megatron.train.callbacks import exports
from tests.running import wait_for
from tests.unit.train.callbacks.a_run import a_run, finish

# Waits for a file named `go` beside the run, then writes the export, or fails if the checkpoint says so.
# Of an export that exists it makes the scores, once a file named `evaluate` is beside the run if the export says so.
STAND_IN = """
import json, os, signal, sys, time
checkpoint, target = sys.argv[1:]
held = os.path.join(checkpoint, "weights")
if os.path.exists(held) and open(held).read() == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(os.path.join(checkpoint, "..", "..", "..", "deaf"), "w")
if os.path.exists(target):
    if open(os.path.join(target, "model")).read() == "unlucky":
        sys.exit("error: no task 'choice'")
    while open(os.path.join(target, "model")).read() == "slow" and not os.path.exists(
        os.path.join(checkpoint, "..", "..", "..", "evaluate")
    ):
        time.sleep(0.01)
    json.dump({"scores": {"choice/acc": 0.5}}, open(os.path.join(target, "evaluation.json"), "w"))
    sys.exit()
while not os.path.exists(os.path.join(checkpoint, "..", "..", "..", "go")):
    time.sleep(0.01)
weights = open(held).read()
if weights == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if weights == "bad":
    sys.exit("warning: first line\\nerror: no tokenizer")
os.makedirs(target)
open(os.path.join(target, "model"), "w").write(weights)
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Any:
    """Exports at steps 4, 8 and 10, the last."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    start = exports.subprocess.Popen

    def stand_in(command: list[str], **how: Any) -> Any:
        run.commands.append(command)
        assert command[:3] == ["nice", "-n", "10"] and how["env"]["CUDA_VISIBLE_DEVICES"] == ""
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & how["env"].keys()
        assert how["env"]["PATH"] == os.environ["PATH"]
        checkpoint = Path(how["stderr"].name).with_suffix("")
        target = checkpoint.parent.parent / "exports" / checkpoint.name
        return start([sys.executable, str(tmp_path / "stand_in.py"), str(checkpoint), str(target)], **how)

    monkeypatch.setattr(exports.subprocess, "Popen", stand_in)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "node7")):
        monkeypatch.setenv(name, value)
    run = a_run(tmp_path / "run")
    run.config.checkpoint.exports = ExportsConfig(4)
    run.last_step = 10
    run.is_due = lambda interval, step: step == 10 or step % interval == 0
    run.records, run.commands = [], []
    run.report = run.records.append
    return run


@pytest.fixture
def callback(run) -> exports.Exports:
    return exports.Exports(run)


def save(callback: exports.Exports, step: int, weights: str = "") -> Path:
    """A checkpoint of 9 tokens a step."""
    checkpoint = callback.run.folder.checkpoints / f"step_{step:08d}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text(weights or f"of {step}")
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    (checkpoint / "progress.json").write_text(json.dumps({"format": 1, "step": step, "consumed_tokens": 9 * step}))
    callback.on_save(checkpoint)
    return checkpoint


def exported(run: Any) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in sorted(run.folder.exports.glob("*/model"))}


def let_go(run: Any) -> None:
    (run.folder.path.parent / "go").touch()


def go_on_until(said: int, callback: exports.Exports) -> None:
    """Train until the run has told people so many things."""
    while len(callback.run.said) < said:
        callback.after_step()
        time.sleep(0.01)


def finish_in_the_next_job(run: Any) -> None:
    callback = exports.Exports(run)
    callback.on_start()
    finish(callback)


def test_what_cannot_be_started_is_left_to_the_next_job(run, callback, monkeypatch):
    full = Mock(side_effect=BlockingIOError(11, "Resource temporarily unavailable"))
    with monkeypatch.context() as patched:
        patched.setattr(exports.subprocess, "Popen", full)
        save(callback, 4)
        callback.after_step()
    (said,) = run.said
    assert "the export of step 4" in said and "temporarily unavailable" in said
    left, halved = (run.folder.exporting / name for name in ("step_00000002.tmp", "step_00000001"))
    left.mkdir()
    halved.mkdir()
    os.utime(left, (0, 0))
    let_go(run)
    finish_in_the_next_job(run)
    assert exported(run) == {"step_00000004": "of 4"} and not left.exists() and not halved.exists()


def test_exports_wait_for_one_another_and_outlive_their_checkpoints(run, callback):
    callback.on_start()
    for step in (2, 4, 6, 8, 10):
        shutil.rmtree(save(callback, step))
        callback.after_step()
    assert exported(run) == {}, "the first one is not done, so no other has begun"
    let_go(run)
    finish(callback)
    assert exported(run) == {f"step_{step:08d}": f"of {step}" for step in (4, 8, 10)}
    waiting, *said = run.said
    assert "waiting for the export of step 4" in waiting
    assert said == [f"exported {run.folder.exports / f'step_{step:08d}'}" for step in (4, 8, 10)]
    assert not list(run.folder.exporting.iterdir())


def test_a_run_that_was_stopped_leaves_its_exports_to_the_next_job(run, callback):
    save(callback, 4)
    callback.close()  # stopped at step 4: nobody waits
    assert exported(run) == {}
    let_go(run)
    finish_in_the_next_job(run)
    assert exported(run) == {"step_00000004": "of 4"}


def test_an_export_that_hears_no_signal_is_killed(run, callback, monkeypatch):
    monkeypatch.setattr(exports, "_GRACE_S", 0.2)
    save(callback, 4, "deaf")
    process, ready = callback._jobs["export"].process._process, run.folder.path.parent / "deaf"
    wait_for(ready.exists)
    callback.close()
    assert process.returncode == -signal.SIGKILL


def test_an_export_ends_with_a_run_that_is_killed(tmp_path):
    """The command waits for a configuration that nobody writes."""
    config = tmp_path / "run.yaml"
    os.mkfifo(config)
    program = "import subprocess, sys; subprocess.call([sys.executable, '-c', *sys.argv[1:]])"
    run = subprocess.Popen([sys.executable, "-c", program, exports._MAIN, "train", str(config)])
    awaited = None
    while awaited is None:
        assert run.poll() is None
        time.sleep(0.01)
        with contextlib.suppress(OSError):  # nobody reads yet
            awaited = os.open(config, os.O_WRONLY | os.O_NONBLOCK)
    run.kill()
    run.wait()
    left = select.poll()
    left.register(awaited, select.POLLERR)
    assert left.poll(20_000), "the command reads on"
    os.close(awaited)


def test_an_export_that_is_killed_is_the_next_jobs(run, callback):
    let_go(run)
    save(callback, 4, "killed")
    save(callback, 8)
    finish(callback)
    assert exported(run) == {"step_00000008": "of 8"}
    assert [said for said in run.said if "step 4" in said and "killed" in said and "next job" in said]
    (run.folder.exporting / "step_00000004/weights").write_text("of 4")
    finish_in_the_next_job(run)
    assert exported(run) == {"step_00000004": "of 4", "step_00000008": "of 8"}


@pytest.mark.parametrize("tasks", [[], ["choice"]])
def test_an_export_that_an_earlier_job_did_not_live_to_notice_is_done(run, callback, tasks):
    run.config.evaluation = EvaluationConfig(tasks=tasks) if tasks else None
    let_go(run)
    save(callback, 4, "whole")
    callback._jobs["export"].process._process.wait()
    shutil.rmtree(run.folder.checkpoints)
    run.commands.clear()
    finish_in_the_next_job(run)
    assert [command[7] for command in run.commands] == ["evaluate"] * len(tasks)
    assert exported(run) == {"step_00000004": "whole"} and not list(run.folder.exporting.iterdir())


def test_a_step_that_is_trained_again_is_exported_again(run, callback):
    let_go(run)
    for weights in ("first", "second"):
        save(callback, 4, weights)
        finish(callback)
        assert exported(run) == {"step_00000004": weights}
    (run.folder.path.parent / "go").unlink()
    save(callback, 8, "first")
    save(callback, 8, "second")  # while the first is under way
    let_go(run)
    finish(callback)
    assert exported(run)["step_00000008"] == "second"


def test_a_rollback_voids_the_exports_of_later_steps_alone(run, callback):
    """Back to step 8, while the export of step 4 is under way and those of steps 8 and 10 wait."""
    for step in (4, 8, 10):
        save(callback, step)
    run.clock.step = 8
    callback.on_rollback({})
    save(callback, 8, "saved again")
    let_go(run)
    finish(callback)
    assert exported(run) == {"step_00000004": "of 4", "step_00000008": "of 8"}
    assert len(run.commands) == 2, "neither was begun anew"
    save(callback, 10, "other course")
    finish(callback)
    assert exported(run)["step_00000010"] == "other course"


def test_an_export_of_a_step_that_is_given_up_is_ended_and_the_step_exported_again(run, callback):
    save(callback, 8, "first")
    run.clock.step = 4
    callback.on_rollback({})
    let_go(run)
    finish(callback)
    assert exported(run) == {} and not list(run.folder.exporting.iterdir())
    save(callback, 8, "second")
    finish(callback)
    assert exported(run) == {"step_00000008": "second"}


def test_an_evaluation_outlives_a_rollback_to_a_later_step(run, callback):
    run.config.evaluation = EvaluationConfig(tasks=["choice"])
    save(callback, 4, "lucky")
    run.clock.step = 6
    callback.on_rollback({})
    let_go(run)
    finish(callback)
    assert run.records == [{"kind": "evaluation", "step": 4, "tokens": 36, "scores": {"choice/acc": 0.5}}]


def test_a_failed_export_is_one_warning_and_the_next_is_made(run, callback):
    let_go(run)
    save(callback, 4, "bad")
    save(callback, 8)
    finish(callback)
    assert run.said[1] == "warning: the export of step 4 failed: no tokenizer"
    assert exported(run) == {"step_00000008": "of 8"}


def test_without_a_task_nothing_is_evaluated(run, callback):
    run.config.evaluation = None
    save(callback, 4, "lucky")
    let_go(run)
    finish(callback)
    assert [command[7] for command in run.commands] == ["export"] and exported(run) == {"step_00000004": "lucky"}


def test_exports_are_evaluated_one_by_one(run, callback):
    run.config.evaluation = EvaluationConfig(tasks=["choice"], include_path="tasks", limit=3)
    for step, weights in ((4, "unlucky"), (8, "lucky")):
        save(callback, step, weights)
    let_go(run)
    finish(callback)
    assert "warning: the evaluation of step 4 failed: no task 'choice'" in run.said
    assert run.records == [{"kind": "evaluation", "step": 8, "tokens": 72, "scores": {"choice/acc": 0.5}}]
    assert run.commands[-1][7:] == [
        *("evaluate", "--model", str(run.folder.exports / "step_00000008")),
        *("--tasks", "choice", "--include-path", "tasks", "--limit", "3"),
    ]


def test_what_an_evaluation_leaves_broken_does_not_end_training(run, callback, monkeypatch):
    """Its scores, and a log that cannot be removed."""
    unlink = Path.unlink

    def broken(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".log":
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, missing_ok)

    run.config.evaluation = EvaluationConfig(tasks=["choice"])
    monkeypatch.setattr(exports, "read_scores", lambda export: json.loads(""))
    monkeypatch.setattr(Path, "unlink", broken)
    let_go(run)
    save(callback, 4)
    finish(callback)
    assert "warning: the scores of step 4" in run.said[-1] and run.records == []


def test_exports_do_not_wait_for_evaluations_nor_keep_the_weights_for_them(run, callback):
    """Steps 4, 8 and 12 are exported while the first evaluation is under way; the next job does not export again."""
    run.config.evaluation = EvaluationConfig(tasks=["choice"])
    let_go(run)
    for step in (4, 8, 12):
        shutil.rmtree(save(callback, step, "slow"))
    go_on_until(3, callback)
    assert run.said == [f"exported {run.folder.exports / f'step_{step:08d}'}" for step in (4, 8, 12)]
    left = sorted(path.relative_to(run.folder.exporting).as_posix() for path in run.folder.exporting.glob("*/*"))
    assert left == [f"step_{step:08d}/progress.json" for step in (4, 8, 12)]
    callback.close()
    run.commands.clear()
    (run.folder.path.parent / "evaluate").touch()
    finish_in_the_next_job(run)
    assert [command[7] for command in run.commands] == ["evaluate"] * 3
    assert [record["step"] for record in run.records] == [4, 8, 12] and not list(run.folder.exporting.iterdir())


def test_a_finished_run_does_not_wait_for_evaluations_for_ever(run, callback, monkeypatch):
    run.config.evaluation = EvaluationConfig(tasks=["choice"])
    handed = []
    run.callbacks = [Mock(on_export=lambda export: handed.append(export.name))]
    let_go(run)
    for step in (4, 8):
        save(callback, step, "slow")
    go_on_until(2, callback)
    assert callback.is_working() and "evaluation of step 4" in run.said[-1]
    monkeypatch.setattr(exports.time, "monotonic", lambda: callback._waits_until + 1)
    assert not callback.is_working()
    *_, first, second = run.said
    for said, step in ((first, 4), (second, 8)):
        assert f"step {step} " in said and f"plt evaluate --model {run.folder.exports / f'step_{step:08d}'}" in said
    assert handed == ["step_00000004", "step_00000008"] and not list(run.folder.exporting.iterdir())


def test_where_no_links_can_be_made_it_says_so(run, callback, monkeypatch):
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(28, "No space left on device")))
    save(callback, 4)
    assert len(run.said) == 1 and "is not exported" in run.said[0] and "No space" in run.said[0]
