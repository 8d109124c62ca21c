"""Running a sweep, around a stand-in for plt train: order, several at once, failures, stopping, resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from sweep_helpers import LOOPS, finish, saved_plan, write_records, write_sweep, write_text_data

from plt_megatron.errors import UserError, go_on_without_readers
from plt_megatron.experiments import sweep
from plt_megatron.experiments.records import (
    RunRecord,
    data_fingerprint,
    failure_of,
    measured_flops_rate,
    read_record,
    remaining_seconds,
    remaining_tokens,
    state_of,
    write_record,
)
from plt_megatron.experiments.sweep import LocalSweep, RunOptions
from plt_megatron.experiments.sweep_plan import load_plan
from plt_megatron.run_folder.files import locked
from plt_megatron.runtime import local_processes
from plt_megatron.slurm import submission
from plt_megatron.slurm.submission import Options
from tests.running import ROOT, wait_for
from tests.running import run as run_command

# Behaves as the run's folder says: `behave` holds fail, hang (until SIGTERM, saving half), start (until a SIGTERM that
# it does not handle yet) or nothing (finish).
LAUNCHER = """
import json, os, shutil, signal, sys, threading
from plt_megatron.config.loader import load_config
from plt_megatron.experiments.sweep_plan import PlannedRun
from plt_megatron.experiments.records import data_fingerprint
from tests.unit.experiments.sweep_helpers import finish
config = load_config(sys.argv[1])
run = PlannedRun("x", {}, config.training.seed, config, 256)
asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())
(run.folder.path / "threads").write_text(os.environ.get("OMP_NUM_THREADS", "none"))
(run.folder.path / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
behave = run.folder.path.parent / (run.folder.path.name + ".behave")
todo = behave.read_text() if behave.exists() else ""
if todo == "start":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
others = sorted(path.parent.name for path in run.folder.path.parent.glob("*/now"))
with (run.folder.path.parent / "log").open("a") as log:
    log.write(json.dumps([run.folder.path.name, others]) + "\\n")
(run.folder.path / "now").touch()
try:
    if todo == "fail":
        print("error: no luck today", file=sys.stderr)
        sys.exit(1)
    if todo == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if todo == "lie":
        sys.exit(0)
    if todo == "start":
        signal.pause()
    if todo == "hang":
        while not asked.wait(0.05):
            pass
        finish(run, 5.0, upto=0.5)
        sys.exit(75)
    shutil.rmtree(run.folder.checkpoints, ignore_errors=True)
    finish(run, 3.0, fingerprint=data_fingerprint(run))
finally:
    (run.folder.path / "now").unlink()
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(LAUNCHER)
    monkeypatch.setattr(sweep, "TRAIN", (sys.executable, str(script)))
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(sweep, "go_on_without_readers", lambda: None)


def behave(plan, name, how):
    plan.folder.joinpath(f"{name}.behave").write_text(how)


def started(plan) -> list[list]:
    return [json.loads(line) for line in (plan.folder / "log").read_text().splitlines()]


def all_run(runs) -> bool:
    """Whether all of them have started, and none has ended."""
    return all((run.folder.path / "now").exists() for run in runs)


@contextlib.contextmanager
def signalled(number, *runs):
    """This process gets a signal once all these runs run."""

    def send():
        wait_for(lambda: all_run(runs))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def small(tmp_path):
    return saved_plan(tmp_path, LOOPS.replace("[1, 2, 3]}", "[1, 2]}").replace("[1, 2, 3]", "[1, 2]"))


def test_all_run_in_order_and_leave_their_notes(tmp_path, launcher, capsys):
    plan = small(tmp_path)
    assert LocalSweep(plan, plan.runs).run() == 0
    assert started(plan) == [[run.name, []] for run in plan.runs]
    assert all(state_of(run) == "finished" for run in plan.runs)
    record = read_record(plan.runs[0].folder)
    assert (record.status, record.exit_status, record.attempts) == ("finished", 0, 1)
    assert record.fingerprint["sources"]["train"] and record.fingerprint["sampling"]["seed"] == 1
    out = capsys.readouterr().out
    assert "[2/4] 2_loops-seed1: finished" in out and "validation loss 3.0000" in out


def test_several_at_once_share_the_cores_and_gpus(tmp_path, launcher, monkeypatch):
    plan = small(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local_processes, "usable_cores", lambda: 6)
    first, second = plan.runs[:2]
    for run in (first, second):
        behave(plan, run.name, "hang")
    local = LocalSweep(plan, plan.runs, jobs=2)
    with signalled(signal.SIGTERM, first, second):
        assert local.run() == 75
    assert {(run.folder.path / "threads").read_text() for run in (first, second)} == {"3"}
    assert [(run.folder.path / "gpu").read_text() for run in (first, second)] == ["2", "5"]
    assert [run.name for run in local.waiting] == [run.name for run in plan.runs[2:]]


def test_a_stopped_sweep_goes_on(tmp_path, launcher):
    plan = small(tmp_path)
    first = plan.runs[0]
    behave(plan, first.name, "hang")
    handler = signal.getsignal(signal.SIGINT)
    with signalled(signal.SIGINT, first):
        assert LocalSweep(plan, plan.runs).run() == 75
    assert signal.getsignal(signal.SIGINT) is handler
    assert [state_of(run) for run in plan.runs] == ["interrupted", "pending", "pending", "pending"]
    behave(plan, first.name, "")
    assert LocalSweep(plan, plan.runs).run() == 0
    assert read_record(first.folder).attempts == 2 and state_of(first) == "finished"


def test_a_stop_while_a_run_is_being_started_is_heard(tmp_path, launcher, monkeypatch):
    """Before it is there to be told, while its data are read, and once it has been started."""
    plan = small(tmp_path)
    run = plan.runs[0]
    behave(plan, run.name, "hang")

    def stop_and(go_on):
        def stopping(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return go_on(*args, **kwargs)

        return stopping

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "data_fingerprint", stop_and(sweep.data_fingerprint))
        local = LocalSweep(plan, plan.runs)
        assert local.run() == 75 and local.waiting == plan.runs and local.outcome == {}
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", stop_and(subprocess.Popen))
        local = LocalSweep(plan, plan.runs)
        assert local.run() == 75 and local.outcome == {run.name: "interrupted"}


def test_a_note_that_cannot_be_written_ends_no_run(tmp_path, launcher, monkeypatch, capsys):
    """A second interrupt kills all that run."""
    plan = small(tmp_path)
    for run in plan.runs[:2]:
        run.folder.path.mkdir(parents=True)
    monkeypatch.setattr(sweep, "write_record", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    local = LocalSweep(plan, plan.runs[:2])
    assert local.run() == 0 and list(local.outcome.values()) == ["finished"] * 2
    assert f"cannot write {plan.runs[1].folder.sweep_note}: Input/output error" in capsys.readouterr().out
    processes = [subprocess.Popen(["sleep", "60"], process_group=0) for _ in range(2)]
    local.running = [
        sweep._Running(run, process, 0.0, RunRecord(), None) for run, process in zip(plan.runs, processes, strict=False)
    ]
    local._signals = [signal.SIGINT] * 2
    monkeypatch.setattr(local, "_note_end", Mock(side_effect=KeyError))
    with pytest.raises(KeyError):
        local._end_all()
    assert [process.wait(10) for process in processes] == [-signal.SIGKILL] * 2


def test_a_sweep_goes_on_without_a_reader_and_without_its_reports(tmp_path, launcher, monkeypatch):
    plan = small(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sweep, "go_on_without_readers", go_on_without_readers)
    monkeypatch.setattr(sweep, "_REPORT_SECONDS", 0.0)
    reports = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr(sweep, "measured_flops_rate", reports)
    with monkeypatch.context() as patch, open(writing, "w") as nobody:
        patch.setattr(sys, "stderr", sys.stderr)
        patch.setattr(sys, "stdout", nobody)
        assert LocalSweep(plan, plan.runs[:2]).run() == 0 and reports.called


def test_an_error_of_a_sweep_has_its_runs_saved(tmp_path, launcher, monkeypatch):
    plan = small(tmp_path)
    runs = plan.runs[:2]
    for run, how in zip(runs, ("hang", "start"), strict=True):
        behave(plan, run.name, how)

    def fail_when_both_run():
        if all_run(runs):
            raise KeyError

    local = LocalSweep(plan, runs, jobs=2)
    monkeypatch.setattr(local, "_report", fail_when_both_run)
    with pytest.raises(KeyError):
        local.run()
    assert [state_of(run) for run in runs] == ["interrupted", "pending"]
    assert list(local.outcome.values()) == ["interrupted"] * 2


def test_a_failure_is_noted_and_the_others_go_on(tmp_path, launcher, capsys):
    plan = small(tmp_path)
    for run, how in zip(plan.runs, ("fail", "crash", "lie"), strict=False):
        behave(plan, run.name, how)
    local = LocalSweep(plan, plan.runs, jobs=2)
    assert local.run() == 1
    assert list(local.outcome.values()).count("finished") == 1 and len(local.outcome) == 4
    reasons = [read_record(run.folder).reason for run in plan.runs[:3]]
    assert reasons[0] == "exited with status 1: no luck today"
    assert reasons[1].startswith("was killed by SIGSEGV")
    assert reasons[2].startswith("ended with status 0 before")
    assert [state_of(run) for run in plan.runs[:2]] == ["failed", "failed"]
    # A job's failure is the past, too, once the run has been started again.
    events = [{"event": "start", "attempt": 1}, {"event": "stop", "reason": "rank 3 was killed by signal 9"}]
    write_records(plan.runs[0].folder.attempts_file, events)
    for run in plan.runs[:3]:
        behave(plan, run.name, "")
    assert LocalSweep(plan, plan.runs[:3]).run() == 0
    assert [failure_of(run) for run in plan.runs[:3]] == [None] * 3
    assert "no luck today" in capsys.readouterr().out


def test_runs_of_several_processes_are_refused_several_at_once(tmp_path):
    plan = saved_plan(tmp_path, LOOPS, ("parallel.tensor_model_parallel_size=2",))
    with pytest.raises(UserError, match="--jobs 2 needs runs of one process"):
        LocalSweep(plan, plan.runs, jobs=2)
    with pytest.raises(UserError, match="--jobs 2 needs runs of one process"):
        sweep.dry_run(plan, plan.runs, RunOptions(jobs=2, dry_run=True), makes_corpus=True)
    sweep.dry_run(plan, plan.runs, RunOptions(dry_run=True), makes_corpus=True)


def test_what_is_done_is_not_done_again(tmp_path, launcher, capsys):
    path = write_sweep(tmp_path)
    settings = [f"output_dir={tmp_path / 'sweeps'}", "seeds=[1]", "axes.model.loop_count=[1, 2]"]
    assert sweep.run_sweep(str(path), settings, RunOptions(dry_run=True)) == 0
    assert not (tmp_path / "sweeps").exists()
    assert "2 of 2 runs to do (seeds 1): 12,800 tokens" in capsys.readouterr().out
    assert sweep.run_sweep(str(path), settings, RunOptions()) == 0
    capsys.readouterr()
    assert sweep.run_sweep(str(path), settings, RunOptions()) == 0
    assert "every run is finished" in capsys.readouterr().out
    sweep.save_plan(sweep.merge(sweep.make_plan(sweep.read_sweep(str(path), [settings[0], "seeds=[3]", settings[2]]))))
    assert sweep.run_sweep(str(path), settings, RunOptions()) == 0
    said = capsys.readouterr().out
    assert "every run is finished" not in said and "1_loop-seed3, 2_loops-seed3" in said
    shutil.rmtree(tmp_path / "sweeps")
    assert sweep.run_sweep(str(path), settings, RunOptions()) == 0
    capsys.readouterr()
    settings[1] = "seeds=[1, 2]"
    assert sweep.run_sweep(str(path), settings, RunOptions()) == 0
    out = capsys.readouterr().out
    assert "2 of 4 runs to do" in out and "GFLOP/s per run of its earlier runs" in out
    assert "2 finished, 0 failed" in out
    with pytest.raises(
        UserError, match="holds another sweep: 1_loop-seed1: training.train_iters was 100, is 60"
    ) as other:
        sweep.run_sweep(str(path), [*settings, "training.train_iters=60"], RunOptions())
    assert "/plan; else" in str(other.value), "where the former settings are"


def test_two_at_once_in_a_folder_are_refused(tmp_path):
    path, settings = str(write_sweep(tmp_path)), [f"output_dir={tmp_path / 'sweeps'}"]
    with locked(saved_plan(tmp_path).folder, "sweep or study"):
        with pytest.raises(UserError, match="another sweep or study is running there"):
            sweep.run_sweep(path, settings, RunOptions())


def test_a_cluster_gets_what_is_not_finished_as_one_array(tmp_path, monkeypatch, capsys):
    submitted: list[Options] = []
    monkeypatch.setattr(submission, "submit", lambda options, root: submitted.append(options))
    path = write_sweep(tmp_path)
    settings = [f"output_dir={tmp_path / 'sweeps'}", "seeds=[1]"]
    plan = saved_plan(tmp_path, LOOPS, ("seeds=[1]",))
    finish(plan.runs[0], 3.0, fingerprint=data_fingerprint(plan.runs[0]))
    write_record(plan.runs[1].folder, RunRecord(status="failed", reason="no luck here"))
    profile = tmp_path / "mine.yaml"
    profile.write_text("gpu: a100\n")
    options = RunOptions(submit=Options(None, cluster=str(profile), max_concurrent=2, time="1:00:00"))
    assert sweep.run_sweep(str(path), settings, options) == 0
    (given,) = submitted
    listing = Path(given.array or "")
    assert given == dataclasses.replace(options.submit, array=str(listing), name="loops")
    assert [Path(line).stem for line in listing.read_text().splitlines()] == ["2_loops-seed1", "3_loops-seed1"]
    assert all(Path(line).is_file() for line in listing.read_text().splitlines())
    assert failure_of(plan.runs[1]) is None
    assert "GPU hours on a100" in capsys.readouterr().out
    for given, card in (("a100:4", "a100"), ("4", "a100"), ("b200:8", "a100"), ("0", "cpu")):  # the profile's first
        asked = dataclasses.replace(options.submit, gpus_per_node=given)
        assert sweep.card_of(RunOptions(submit=asked)) == card
    profile.write_text("processes_per_node: 2\n")
    for given, card in (("a100:4", "a100"), ("4", "h100"), (None, "cpu")):
        asked = dataclasses.replace(options.submit, gpus_per_node=given)
        assert sweep.card_of(RunOptions(submit=asked)) == card
    assert sweep.run_sweep(str(path), settings, dataclasses.replace(options, dry_run=True)) == 0
    said = capsys.readouterr().out
    assert "process hours on cpu" in said


def test_a_dry_run_for_a_cluster_shows_the_array_and_writes_nothing(tmp_path):
    """Through the real submit command, which also refuses what it would refuse."""
    path = write_sweep(tmp_path)
    write_text_data(tmp_path)
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), str(path), f"output_dir={tmp_path / 'sweeps'}"]
    command += ["seeds=[1]", "--slurm", "--cluster", str(ROOT / "configs/clusters/cpu.yaml"), "--dry-run"]
    command += ["--submit", "--time 1:00:00", "parallel.data_parallel_size=2", "training.global_batch_size=4"]
    done = run_command([*command, "--max-concurrent", "2"], tmp_path)
    assert "3 of 3 runs to do" in done.stdout and "#SBATCH --array=1-3%2" in done.stdout
    assert "#SBATCH --time=01:00:00" in done.stdout and "job-name=loops-" in done.stdout
    assert not (tmp_path / "sweeps").exists()
    refused = run_command([*command, "training.global_batch_size=3"], tmp_path, status=2)
    assert "global_batch_size 3 is not divisible" in refused.stderr
    for option in ("--follow", "--dry-run"):  # the sweep's own --dry-run submits nothing and says so
        refused = run_command([*command, f"--submit={option}"], tmp_path, status=2)
        assert refused.stderr.startswith("error: --submit takes options of plt submit")


def test_states_follow_from_what_lies_in_the_folder(tmp_path):
    plan = saved_plan(tmp_path)
    done, half, unsaved, not_validated, pending = plan.runs[:5]
    finish(done, 3.0)
    finish(half, 3.0, upto=0.4)
    finish(unsaved, 3.0)
    (unsaved.folder.checkpoints / "step_00000100").rename(unsaved.folder.checkpoints / "step_00000090")
    (unsaved.folder.checkpoints / "latest").write_text("step_00000090\n")
    finish(not_validated, 3.0)
    lines = not_validated.folder.metrics_file.read_text().splitlines(keepends=True)
    not_validated.folder.metrics_file.write_text("".join(line for line in lines[:-1]))
    states = [state_of(run) for run in (done, half, unsaved, not_validated, pending)]
    assert states == ["finished", "interrupted", "interrupted", "interrupted", "pending"]


def test_a_copy_of_a_finished_run_without_checkpoints_is_finished(tmp_path):
    """By the sweep's note; without one, or with some earlier checkpoint, there is something left to do."""
    plan = saved_plan(tmp_path)
    noted, unnoted, failed, earlier = plan.runs[:4]
    for run in (noted, unnoted, failed, earlier):
        finish(run, 3.0)
    for run in (noted, earlier):
        write_record(run.folder, RunRecord(status="finished"))
    write_record(failed.folder, RunRecord(status="failed", reason="disk full"))
    for run in (noted, unnoted, failed):
        shutil.rmtree(run.folder.checkpoints)
    (earlier.folder.checkpoints / "step_00000100").rename(earlier.folder.checkpoints / "step_00000050")
    (earlier.folder.checkpoints / "latest").write_text("step_00000050\n")
    states = [state_of(run) for run in (noted, unnoted, failed, earlier)]
    assert states == ["finished", "interrupted", "failed", "interrupted"]


def test_a_finished_sweep_goes_on_elsewhere_from_its_records_alone(tmp_path, launcher, capsys):
    """Finished by Slurm, so without notes: the command adds them. A copy of what is small is then extended."""
    path = write_sweep(tmp_path)
    loops = "axes.model.loop_count=[1, 2]"
    plan = saved_plan(tmp_path, LOOPS, ("seeds=[1]", loops))
    for run in plan.runs:
        finish(run, 3.0, fingerprint=data_fingerprint(run))
    there = f"output_dir={tmp_path / 'sweeps'}"
    assert sweep.run_sweep(str(path), [there, "seeds=[1]", loops], RunOptions()) == 0
    assert "every run is finished" in capsys.readouterr().out
    ignored = shutil.ignore_patterns("checkpoints", "exports", ".lock")
    shutil.copytree(plan.folder, tmp_path / "results" / plan.name, ignore=ignored)
    shutil.rmtree(tmp_path / "sweeps")
    here = f"output_dir={tmp_path / 'results'}"
    assert sweep.run_sweep(str(path), [here, "seeds=[1, 2]", loops], RunOptions()) == 0
    out = capsys.readouterr().out
    assert "2 of 4 runs to do" in out and "2 finished, 0 failed" in out
    copied = load_plan(tmp_path / "results" / plan.name)
    assert [state_of(run) for run in copied.runs] == ["finished"] * 4
    assert not copied.runs[0].folder.checkpoints.exists()


def test_going_on_with_other_data_is_refused(tmp_path, launcher):
    path = write_sweep(tmp_path)
    settings = [f"output_dir={tmp_path / 'sweeps'}", "axes.model.loop_count=[1, 2]"]
    assert sweep.run_sweep(str(path), [*settings, "seeds=[1]"], RunOptions()) == 0
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").write_bytes(bytes(reversed(range(256))))
    said = "1_loop-seed2 would read other data than 1_loop-seed1 has read .other train and validation data or weights"
    with pytest.raises(UserError, match=said):
        sweep.run_sweep(str(path), [*settings, "seeds=[1, 2]"], RunOptions())
    assert not (tmp_path / "sweeps" / "loops" / "1_loop-seed2").exists()


def test_an_earlier_attempts_error_is_not_the_reason(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("error: data/corpus.idx not found\n")
    start = log.stat().st_size
    assert sweep._reason(log, -9, start).startswith("was killed by SIGKILL") and "corpus" not in sweep._reason(
        log, -9, start
    )
    assert "corpus.idx" in sweep._reason(log, 2, 0)


def test_time_is_told_from_what_was_measured(tmp_path):
    plan = saved_plan(tmp_path)
    assert measured_flops_rate(plan.runs) is None
    run = plan.runs[0]
    finish(run, 3.0, upto=0.5)
    rate = measured_flops_rate(plan.runs)
    assert rate == pytest.approx(1000.0 * run.flops_per_token)
    assert remaining_seconds([run], rate) == pytest.approx(50 * 64 / 1000.0)
    branch = plan.runs[1]
    branch.config.checkpoint.load = "elsewhere/1_loop-seed1/checkpoints/step_00000080"
    assert remaining_tokens(branch) == branch.tokens - 80 * 64
    branch.config.checkpoint.weights_only = True  # starts at its own first step
    assert remaining_tokens(branch) == branch.tokens
    same = [r for r in plan.runs if r.labels == run.labels]
    assert remaining_seconds(same, rate, jobs=2) == pytest.approx(100 * 64 / 1000.0 + 50 * 64 / 1000.0)
