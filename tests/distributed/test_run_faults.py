"""Whole runs with faults injected: what the user reads, the exit status, and that nothing is lost."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plt_megatron.config.schema import DataConfig, RunConfig
from plt_megatron.run_folder.checkpoints import checkpoint_folders
from plt_megatron.run_folder.folder import RunFolder
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import ROOT, LocalRun, folder, last_step, numbers

HARMED = str(Path(__file__).with_name("harmed_run.py"))
PP2 = {"pipeline_model_parallel_size": 2}
TP_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


# ---------------------------------------------------------------- a rank is killed


# A run that saves every second step, and one that only a fault ends.
SAVING = {"parallel": PP2, "validation": {"interval": 5}, "checkpoint": {"save_interval": 2, "keep_last": 3}}
ENDLESS = {
    "parallel": {**TP_SP, "distributed_timeout_seconds_after_init": 2.0},
    "training": {"train_iters": 100_000},
    "validation": {"interval": 0},
    "checkpoint": {"save_interval": 0},
}


def load_each(config: RunConfig) -> list[int]:
    """The steps of the checkpoints that are listed as whole; each is loaded, as a run loads it."""
    from megatron.core import parallel_state

    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.checkpoint.loading import load_checkpoint
    from plt_megatron.train.megatron_engine import MegatronEngine

    init_process_groups(config.parallel)
    engine = MegatronEngine(config, 380)
    steps = [load_checkpoint(engine, path)["step"] for path in checkpoint_folders(folder(config) / "checkpoints")]
    parallel_state.destroy_model_parallel()
    return steps


def check_what_is_left(config: RunConfig, undisturbed: list[dict], run_distributed) -> None:
    """Every checkpoint that is listed loads, and the metrics so far are the undisturbed run's."""
    if not (folder(config) / "checkpoints").is_dir():
        return
    listed = [int(path.name.removeprefix("step_")) for path in checkpoint_folders(folder(config) / "checkpoints")]
    assert sorted(run_distributed(load_each, 2, config)) == sorted(listed)
    records = numbers(config)
    assert records == undisturbed[: len(records)]


@pytest.mark.slow
def test_a_command_killed_twenty_times_has_the_metrics_of_one_left_alone(run_distributed, data, tmp_path):
    """Real commands; the moment is drawn in steps, then to the fraction of one: saves, every second step, included."""
    whole = run_config("whole", tmp_path, data, SAVING, training={"train_iters": 60})
    run = LocalRun(whole)
    assert run.finish() == 0, run.err
    config = run_config("killed", tmp_path, data, SAVING, training={"train_iters": 60})
    draw, kills = random.Random(4), 0
    while kills < 20:
        config.checkpoint.async_save = kills % 2 == 1
        run = LocalRun(config)
        begun, ahead, rank = last_step(config), draw.randrange(5), draw.randrange(2)
        run.pid(rank)
        run.until(lambda begun=begun, ahead=ahead: last_step(config) >= min(begun + ahead, 58))
        time.sleep(draw.uniform(0, 0.5))
        if run.process.poll() is None:
            run.signal(rank, signal.SIGKILL)
            kills += 1
        status = run.finish()
        assert status in (0, 128 + signal.SIGKILL, 1), run.err
        assert status == 0 or f"rank {rank} was killed by SIGKILL" in run.err, run.err
        check_what_is_left(config, numbers(whole), run_distributed)
        if status == 0:  # it got through: once more from the start
            assert numbers(config) == numbers(whole)
            shutil.rmtree(folder(config))
    run = LocalRun(config)
    assert run.finish() == 0, run.err
    assert numbers(config) == numbers(whole)


# ---------------------------------------------------------------- a rank hangs


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_job_and_is_named(data, tmp_path, rank):
    config = run_config("stopped", tmp_path, data, ENDLESS)
    run = LocalRun(config)
    run.until(lambda: last_step(config) >= 3)
    run.signal(rank, signal.SIGSTOP)
    stopped = time.monotonic()
    assert run.finish() == 1, run.err
    assert time.monotonic() - stopped < 60
    (line,) = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert f"rank {rank}" in line.partition(": rank ")[2] or f"from rank {rank}" in line, line
    assert list((folder(config) / "incidents").glob("hang_rank_*.txt"))


def test_a_rank_that_is_stuck_is_named_with_where_it_stands(data, tmp_path, warm_python):
    config = run_config("stuck", tmp_path, data, ENDLESS)
    config.parallel.distributed_timeout_seconds_after_init = 3.0
    run = LocalRun(config, [warm_python, HARMED, "stuck"])
    assert run.finish() == 1, run.err
    assert "the others wait for rank 1 on " in run.err and "wait" in run.err, run.err
    stacks = (folder(config) / "incidents" / "hang_rank_0001.txt").read_text()
    assert "harmed_run.py" in stacks and "trainer.py" in stacks


# ---------------------------------------------------------------- disks and clocks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(run_distributed, data, small_disk, warm_python):
    config = run_config("full", small_disk, data, SAVING, training={"train_iters": 40})
    run = LocalRun(config, python=warm_python)
    checkpoints = folder(config) / "checkpoints"
    run.until(lambda: (checkpoints / "latest").exists())
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 1024, 1):
            try:
                while True:
                    assert file.write(b"x" * size)
            except OSError:
                continue
    status = run.finish()
    assert status in (1, 2), run.err
    (line,) = {line for line in run.err.splitlines() if line.startswith("error: ")}
    assert "No space left on device" in line and "the last checkpoint is intact" in line.lower(), line
    assert "Traceback" not in run.err
    filler.unlink()
    assert run_distributed(train, 2, config) is True
    assert [record["step"] for record in numbers(config, "train")] == list(range(1, 41))


def test_an_error_of_one_ranks_disk_is_said_with_its_rank(data, tmp_path, warm_python):
    config = run_config("unreadable", tmp_path, data, ENDLESS)
    run = LocalRun(config, [warm_python, HARMED, "unreadable"])
    assert run.finish() == 1
    assert "error: rank 1: [Errno 5] Input/output error: 'corpus.bin'. There is no checkpoint yet" in run.err
    assert "Traceback" not in run.err


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(run_distributed, data, tmp_path, warm_python):
    whole = run_config("whole", tmp_path, data, parallel=TP_SP, training={"train_iters": 6})
    assert run_distributed(train, 2, whole) is True
    config = run_config("jumped", tmp_path, data, parallel=TP_SP, training={"train_iters": 6})
    run = LocalRun(config, [warm_python, HARMED, "clock"])
    assert run.finish() == 0, run.err
    assert numbers(config) == numbers(whole)
    steps = [record for record in RunFolder(folder(config)).records() if record["kind"] == "train"]
    assert all(0 < seconds < 1000 for record in steps for seconds in record["step_seconds"].values())


def test_a_data_file_that_vanished_is_one_line_before_anything_starts(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(Path(data.sources[0].path).parent, copy)
    config = run_config("vanished", tmp_path, data)
    config.data = DataConfig(**{**vars(data), "sources": [type(data.sources[0])(path=str(copy / "text"))]})
    (copy / "text.bin").unlink()
    run = LocalRun(config)
    assert run.finish() == 2
    assert run.err.startswith("error: ") and "text.bin" in run.err and run.err.count("\n") == 1, run.err
    assert not folder(config).exists()


def test_a_run_folder_that_cannot_be_written_is_one_line(data, tmp_path):
    config = run_config("inside", tmp_path / "file", data)
    (tmp_path / "file").write_text("in the way")
    config.output_dir = str(tmp_path)  # where its configuration lies
    run = LocalRun(config, [sys.executable, str(ROOT / "launch/train.py"), f"output_dir={tmp_path}/file"])
    assert run.finish() == 2
    assert run.err.startswith("error: ") and str(tmp_path / "file") in run.err and run.err.count("\n") == 1, run.err
