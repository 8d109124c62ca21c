"""The queue of exports, with a stand-in for the exporting process; whole runs export in tests/distributed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.config.schema import EvaluationConfig, ExportsConfig
from plt_megatron.train.callbacks import beside, exports
from tests.unit.train.callbacks.a_run import a_run, finish

# Waits for a file named `go` beside the run, then writes the export, or fails if the checkpoint says so.
# Of an export that exists it makes the scores.
STAND_IN = """
import json, os, signal, sys, time
checkpoint, target = sys.argv[1:]
if open(os.path.join(checkpoint, "weights")).read() == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(os.path.join(checkpoint, "..", "..", "..", "deaf"), "w")
if os.path.exists(target):
    if open(os.path.join(target, "model")).read() == "unlucky":
        sys.exit("error: no task 'choice'")
    json.dump({"scores": {"choice/acc": 0.5}}, open(os.path.join(target, "evaluation.json"), "w"))
    sys.exit()
while not os.path.exists(os.path.join(checkpoint, "..", "..", "..", "go")):
    time.sleep(0.01)
weights = open(os.path.join(checkpoint, "weights")).read()
if weights == "bad":
    sys.exit("warning: first line\\nerror: no tokenizer")
os.makedirs(target)
open(os.path.join(target, "model"), "w").write(weights)
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Any:
    """Exports at steps 4, 8 and 10, the last."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    start = beside.subprocess.Popen

    def stand_in(command: list[str], **how: Any) -> Any:
        run.commands.append(command)
        assert command[:3] == ["nice", "-n", "10"] and how["env"]["CUDA_VISIBLE_DEVICES"] == ""
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & how["env"].keys()
        assert how["env"]["PATH"] == os.environ["PATH"]
        checkpoint = Path(how["stderr"].name).with_suffix("")
        target = checkpoint.parent.parent / "exports" / checkpoint.name
        return start([sys.executable, str(tmp_path / "stand_in.py"), str(checkpoint), str(target)], **how)

    monkeypatch.setattr(beside.subprocess, "Popen", stand_in)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "node7")):
        monkeypatch.setenv(name, value)
    run = a_run(tmp_path / "run")
    run.config.checkpoint.exports = ExportsConfig(4)
    run.last_step = 10
    run.is_due = lambda interval, step: step == 10 or step % interval == 0
    run.records, run.commands = [], []
    run.report = run.records.append
    return run


def save(run: Any, step: int, weights: str = "") -> Path:
    checkpoint = run.folder.checkpoints / f"step_{step:08d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "weights").unlink(missing_ok=True)
    (checkpoint / "weights").write_text(weights or f"of {step}")
    run.clock.step = step
    return checkpoint


def remove(checkpoint: Path) -> None:
    (checkpoint / "weights").unlink()
    checkpoint.rmdir()


def exported(run: Any) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in sorted(run.folder.exports.glob("*/model"))}


def let_go(run: Any) -> None:
    (run.folder.path.parent / "go").touch()


def test_exports_wait_for_one_another_and_outlive_their_checkpoints(run):
    callback = exports.Exports(run)
    callback.on_start()
    for step in (2, 4, 6, 8, 10):
        checkpoint = save(run, step)
        callback.on_save(checkpoint)
        remove(checkpoint)
        callback.after_step()
    assert exported(run) == {}, "the first one is not done, so no other has begun"
    let_go(run)
    finish(callback)
    assert exported(run) == {f"step_{step:08d}": f"of {step}" for step in (4, 8, 10)}
    assert run.said == [f"exported {run.folder.exports / f'step_{step:08d}'}" for step in (4, 8, 10)]
    assert not list(run.folder.exporting.iterdir())


def test_a_run_that_was_stopped_leaves_its_exports_to_the_next_job(run):
    callback = exports.Exports(run)
    callback.on_save(save(run, 4))
    callback.close()  # stopped at step 4: nobody waits
    assert exported(run) == {}
    let_go(run)
    again = exports.Exports(run)
    again.on_start()
    run.clock.step = 10
    finish(again)
    assert exported(run) == {"step_00000004": "of 4"}


def test_an_export_that_hears_no_signal_is_killed(run, monkeypatch):
    monkeypatch.setattr(beside, "_GRACE_S", 0.2)
    callback = exports.Exports(run)
    callback.on_save(save(run, 4, "deaf"))
    process, ready = callback._process._process, run.folder.path.parent / "deaf"
    while not ready.exists():
        time.sleep(0.01)
    callback.close()
    assert process.returncode == -signal.SIGKILL


def test_a_step_that_is_trained_again_is_exported_again(run):
    callback = exports.Exports(run)
    let_go(run)
    for weights in ("first", "second"):
        callback.on_save(save(run, 4, weights))
        run.clock.step = 10
        finish(callback)
        assert exported(run) == {"step_00000004": weights}
    (run.folder.path.parent / "go").unlink()
    callback.on_save(save(run, 8, "first"))
    callback.on_save(save(run, 8, "second"))  # while the first is under way
    let_go(run)
    run.clock.step = 10
    finish(callback)
    assert exported(run)["step_00000008"] == "second"


def test_a_rollback_voids_the_exports_of_later_steps_alone(run):
    """Back to step 8, while the export of step 4 is under way and those of steps 8 and 10 wait."""
    callback = exports.Exports(run)
    for step in (4, 8, 10):
        callback.on_save(save(run, step))
    run.clock.step = 8
    callback.on_rollback({})
    callback.on_save(save(run, 8, "saved again"))
    let_go(run)
    finish(callback)
    assert exported(run) == {"step_00000004": "of 4", "step_00000008": "of 8"}
    assert len(run.commands) == 2, "neither was begun anew"
    callback.on_save(save(run, 10, "other course"))
    finish(callback)
    assert exported(run)["step_00000010"] == "other course"


def test_an_export_of_a_step_that_is_given_up_is_ended_and_the_step_exported_again(run):
    callback = exports.Exports(run)
    callback.on_save(save(run, 8, "first"))
    run.clock.step = 4
    callback.on_rollback({})
    let_go(run)
    finish(callback)
    assert exported(run) == {} and not list(run.folder.exporting.iterdir())
    callback.on_save(save(run, 8, "second"))
    finish(callback)
    assert exported(run) == {"step_00000008": "second"}


def test_an_evaluation_outlives_a_rollback_to_a_later_step(run):
    run.config.evaluation = EvaluationConfig(tasks=["choice"])
    callback = exports.Exports(run)
    checkpoint = save(run, 4, "lucky")
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    (checkpoint / "progress.json").write_text(json.dumps({"format": 1, "step": 4, "consumed_tokens": 36}))
    callback.on_save(checkpoint)
    run.clock.step = 6
    callback.on_rollback({})
    let_go(run)
    run.clock.step = 10
    finish(callback)
    assert run.records == [{"kind": "evaluation", "step": 4, "tokens": 36, "scores": {"choice/acc": 0.5}}]


def test_a_failed_export_is_one_warning_and_the_next_is_made(run):
    callback = exports.Exports(run)
    let_go(run)
    callback.on_save(save(run, 4, "bad"))
    callback.on_save(save(run, 8))
    run.clock.step = 10
    finish(callback)
    assert run.said[0] == "warning: the export of step 4 failed: no tokenizer"
    assert exported(run) == {"step_00000008": "of 8"}


def test_without_a_task_nothing_is_evaluated(run):
    run.config.evaluation = None
    callback = exports.Exports(run)
    callback.on_save(save(run, 4, "lucky"))
    let_go(run)
    run.clock.step = 5
    finish(callback)
    assert [command[6] for command in run.commands] == ["export"] and exported(run) == {"step_00000004": "lucky"}


def test_exports_are_evaluated_one_by_one(run):
    run.config.evaluation = EvaluationConfig(tasks=["choice"], include_path="tasks", limit=3)
    callback = exports.Exports(run)
    for step, weights in ((4, "unlucky"), (8, "lucky")):
        checkpoint = save(run, step, weights)
        (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
        (checkpoint / "progress.json").write_text(json.dumps({"format": 1, "step": step, "consumed_tokens": 9 * step}))
        callback.on_save(checkpoint)
    let_go(run)
    run.clock.step = 10
    finish(callback)
    assert "warning: the evaluation of step 4 failed: no task 'choice'" in run.said
    assert run.records == [{"kind": "evaluation", "step": 8, "tokens": 72, "scores": {"choice/acc": 0.5}}]
    assert run.commands[-1][5:] == [
        *("plt_megatron", "evaluate", "--model", str(run.folder.exports / "step_00000008")),
        *("--tasks", "choice", "--include-path", "tasks", "--limit", "3"),
    ]


def test_where_no_links_can_be_made_it_says_so(run, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    callback = exports.Exports(run)
    callback.on_save(save(run, 4))
    assert len(run.said) == 1 and "is not exported" in run.said[0] and "not supported" in run.said[0]


def test_other_ranks_and_runs_without_exports_do_nothing(run):
    run.is_first_rank = False
    other = exports.Exports(run)
    run.is_first_rank, run.config.checkpoint.exports = True, None
    for callback in (other, exports.Exports(run)):
        callback.on_start()
        callback.on_save(save(run, 4))
        finish(callback)
        callback.close()
    assert not run.folder.exporting.exists()
