"""Every kind of fault, on a real Slurm cluster: the run ends like an undisturbed one, or stops and says why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import DataConfig, DataSource
from plt_megatron.run_folder.folder import save_config
from tests.running import wait_for
from tests.slurm.runs import SAVE_INTERVAL, SlurmRun, make_config, submit

pytestmark = pytest.mark.slurm_faults


@pytest.fixture
def make_run(slurm, slurm_data, tmp_path):
    """`make_run(**settings)`: a run that nothing has happened to yet."""

    def make(config: dict | None = None, data: DataConfig = slurm_data, **settings) -> SlurmRun:
        return SlurmRun(slurm, make_config("run", tmp_path, data, **(config or {}))).prepare(**settings)

    return make


@pytest.mark.parametrize(
    ("lost", "left", "statuses"),
    [("node2", ["node1", "node3"], ("node_failed", "killed")), ("node1", ["node2", "node3"], ("killed",))],
)
def test_a_node_that_loses_power(slurm, make_run, undisturbed, lost, left, statuses):
    """Slurm finds out and requeues; the third node takes its place, also of the one that coordinates, and where the
    batch script runs."""
    run = make_run()
    run.submit()
    run.wait_for_step(6)
    slurm.control("node-off", lost)
    run.wait_for_attempt(2)
    assert run.events("start")[1]["nodes"] == left
    assert run.statuses()[0] in statuses
    run.end_like(undisturbed, run.statuses()[0], "finished")


def test_a_killed_launcher(make_run, undisturbed):
    """The run loses its node, notices at once, and requeues the job."""
    run = make_run()
    run.submit()
    run.wait_for_step(6)
    os.kill(run.launcher_process("node2"), signal.SIGKILL)
    run.end_like(undisturbed, "node_failed", "finished")
    assert "node2 is lost" in run.events("end")[0]["reason"]


def test_a_job_of_higher_priority(slurm, make_run, undisturbed, tmp_path):
    """Slurm preempts: the run saves, exits, and resumes when the nodes are free again."""
    run = make_run()
    run.submit()
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\ntrue\n")
    options = ("--partition=urgent", "--nodes=3", "--exclusive", f"--output={tmp_path}/urgent.out")
    with run.paused(6):
        job = slurm.sbatch(urgent, *options)
        wait_for(lambda: run.said("asked to stop"), "the request to arrive", 60, run.outputs)
    run.end_like(undisturbed, "preempted", "finished")
    assert slurm.state_of(job) == "COMPLETED"
    assert slurm.job(run.job)["Restarts"] == "1"


def test_a_requeue(slurm, make_run, undisturbed):
    """`scontrol requeue`: saved, and the same job again."""
    run = make_run()
    run.submit()
    run.disturb(6, "scontrol", "requeue", run.job)
    run.end_like(undisturbed, "preempted", "finished")
    assert slurm.job(run.job)["Restarts"] == "1"


def test_slurms_own_warning_before_the_limit(slurm, make_run, undisturbed):
    """Not sent by the test: Slurm sends it between 60 and 120 s after the start, and would end the job 60 s later."""
    run = make_run({"parallel": {"distributed_timeout_minutes": 10.0}})
    run.submit("--time=3", "--signal=B:USR1@60")
    wait_for((run.folder / "logs" / "rank-0003.log").exists, "the ranks to be started", 300, run.outputs)
    process = run.rank_process(3)
    os.kill(process, signal.SIGSTOP)  # before the first step: a hang there is not taken for one
    try:
        wait_for(lambda: run.said("asked to stop"), "Slurm's signal", 300, run.outputs)
    finally:
        os.kill(process, signal.SIGCONT)
    wait_for(run.over, "the end", 500, run.outputs)
    # A slow machine may be warned again; what it has saved is not lost.
    assert run.statuses()[0] == "preempted" and set(run.statuses()[1:-1]) <= {"preempted"}, run.outputs()
    run.wait_until_over()
    assert int(slurm.job(run.job)["Restarts"]) == len(run.statuses()) - 1 > 0
    run.check(undisturbed)


def test_a_rank_that_hangs(make_run, undisturbed):
    """The others' watchdog names it; all are started again in the same allocation."""
    run = make_run({"parallel": {"distributed_timeout_seconds_after_init": 10.0}})
    run.submit()
    with run.paused(6):
        run.wait_for_end("failed")
    hung = run.events("end")[0]
    assert "rank 3" in hung["reason"], hung
    run.end_like(undisturbed, "failed", "finished")


def test_a_chain_of_jobs(slurm, make_run, undisturbed):
    """Two reach their limit, the third finishes, and the fourth is not needed."""
    run = make_run(requeue=False, chain=4)
    jobs = [run.submit() for _ in range(4)]
    for job, step in zip(jobs, (5, 12), strict=False):
        run.job = job
        run.warn(step)
        slurm.wait_for_state(job, "FAILED", "COMPLETED")
        assert slurm.job(job)["ExitCode"] == "75:0", "it says that it was preempted"
    run.wait_for_end("preempted", "preempted", "finished")
    assert [end["job_id"] for end in run.events("end")] == jobs[:3]
    slurm.wait_for_state(jobs[2], "COMPLETED")
    slurm.wait_for_state(jobs[3], "CANCELLED")
    run.check(undisturbed)


def test_a_cancelled_job_submitted_again_by_hand(slurm, make_run, undisturbed):
    run = make_run()
    first = run.submit()
    run.disturb(6, "scancel", run.job)
    slurm.wait_for_state(first, "CANCELLED")
    wait_for(lambda: not slurm.jobs(), "the job to be gone", 30)
    assert len(run.events("start")) == 1, "a job that somebody cancels is not requeued"
    run.submit()
    wait_for(lambda: len(run.events("end")) == 2, "the end", 500, run.outputs)
    assert run.statuses()[1] == "finished", (run.events(), run.outputs())
    run.wait_until_over()
    run.check(undisturbed)


def test_a_second_job_for_one_run_leaves_it_alone(slurm, make_run, undisturbed):
    """Under another name, so that it does not wait: as a member of an array and a job by hand would meet."""
    run = make_run()
    first = run.submit()
    with run.paused(6):
        second = run.submit("--job-name=another")
        slurm.wait_for_state(second, "FAILED")
    assert slurm.job(second)["ExitCode"] == "78:0"
    assert f"error: job {first} is training {run.folder}" in run.outputs()
    run.job = first
    run.end_like(undisturbed, "finished")


def test_a_bad_node_is_excluded(slurm, make_run, undisturbed):
    """Preflight names it, and the job goes on without it, even one that Slurm is not to requeue."""
    slurm.control("in-node", "node2", "mount", "-o", "remount,size=1m", "/dev/shm")
    try:
        run = make_run(requeue=False)
        run.submit()
        run.wait_for_end("node_failed", "finished")
        run.wait_until_over()
    finally:
        slurm.control("in-node", "node2", "mount", "-o", "remount,size=256m", "/dev/shm")
    bad = run.events("end")[0]
    assert list(bad["bad_nodes"]) == ["node2"] and "node2: /dev/shm: 1 MiB free" in bad["reason"]
    assert run.events("end")[1]["nodes"] == ["node1", "node3"]
    job = slurm.job(run.job)
    assert (job["ExcNodeList"], job["Requeue"], job["Restarts"]) == ("node2", "0", "1")
    run.check(undisturbed)


def test_a_node_with_another_version_is_excluded(slurm, make_run, undisturbed):
    """Of the two, the first node's counts; the third agrees with it."""
    path = Path(str(importlib.metadata.distribution("torch").locate_file(""))) / f"torch-{version('torch')}.dist-info"
    path /= "METADATA"
    other = slurm.state / "METADATA"
    other.write_text(path.read_text().replace("\nVersion: ", "\nVersion: 1!", 1))
    slurm.control("in-node", "node2", "mount", "--bind", str(other), str(path))
    try:
        run = make_run()
        run.submit()
        run.wait_for_end("node_failed", "finished")
        run.wait_until_over()
    finally:
        slurm.control("in-node", "node2", "umount", str(path))
    assert "node2: torch 1!" in run.events("end")[0]["reason"]
    run.check(undisturbed)


def test_too_many_bad_nodes(slurm, make_run):
    """After k exclusions the run stops and says so."""
    nodes = ("node2", "node3")
    for node in nodes:
        slurm.control("in-node", node, "mount", "-o", "remount,size=1m", "/dev/shm")
    try:
        run = make_run(max_exclusions=1)
        run.submit()
        run.wait_for_end("node_failed", "node_failed")
        run.wait_until_over("FAILED")
    finally:
        for node in nodes:
            slurm.control("in-node", node, "mount", "-o", "remount,size=256m", "/dev/shm")
    assert "node3: /dev/shm" in run.why().splitlines()[0]


def test_data_that_goes_bad_stops_the_chain(slurm, make_run, slurm_data, tmp_path):
    """A file that is cut short under its reader: SIGBUS, and after the restart a user's error."""
    own = tmp_path / "data"
    own.mkdir()
    source = Path(slurm_data.sources[0].path)
    for suffix in (".bin", ".idx"):
        (own / f"text{suffix}").write_bytes(source.with_suffix(suffix).read_bytes())
    manifest = Path(f"{source}.manifest.json")
    if manifest.exists():
        (own / "text.manifest.json").write_bytes(manifest.read_bytes())
    data = dataclasses.replace(slurm_data, sources=[DataSource(path=str(own / "text"))])
    run = make_run(data=data, requeue=True, chain=3)
    jobs = [run.submit() for _ in range(3)]
    run.job = jobs[0]
    with run.paused(6):
        os.truncate(own / "text.bin", 0)
    slurm.wait_for_state(jobs[0], "FAILED", seconds=500)
    for job in jobs[1:]:
        slurm.wait_for_state(job, "CANCELLED")
    assert run.statuses() == ["failed", "failed"], run.outputs()
    assert "SIGBUS" in run.events("end")[0]["reason"]
    why = run.why()
    assert "text.bin" in why.splitlines()[0], why
    assert "step_00000004" in why and "rank " in why and "exited with status 2" in why


def test_a_failure_that_comes_back_stops_the_run(slurm, make_run):
    """No progress between two attempts: the allocation is given back, and why.txt has the rank and its last lines."""
    training = {"on_nonfinite": "fail"}
    config = {"training": training, "optimizer": {"lr": 1e30, "min_lr": 1e29}, "checkpoint": {"save_interval": 1}}
    run = make_run(config=config)
    run.submit()
    run.wait_until_over("FAILED", seconds=500)
    assert run.statuses() == ["failed", "failed"], run.outputs()
    assert slurm.job(run.job)["Restarts"] == "0" and slurm.job(run.job)["ExitCode"] == "1:0"
    why = run.why()
    assert "not finite" in why.splitlines()[0] and "failed again" in why.splitlines()[0], why
    assert "rank 0 on node1 exited with status 1; its last lines:" in why
    assert "last complete checkpoint: " in why and "checkpoints/step_" in why


def test_a_full_disk_of_logs(slurm, make_run, undisturbed):
    """One node cannot write its logs: lines are lost, the run is not."""
    run = make_run()
    slurm.control("in-node", "node2", "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(run.folder / "logs"))
    try:
        run.submit()
        run.wait_for_end("finished")
        run.wait_until_over()
    finally:
        slurm.control("in-node", "node2", "umount", str(run.folder / "logs"))
    run.check(undisturbed)
    assert not (run.folder / "logs" / "rank-0002.log").exists()


def test_a_file_named_stop_is_a_persons_will(slurm, make_run, undisturbed):
    """Saved, and not requeued."""
    run = make_run()
    run.submit()
    with run.paused(6):
        (run.folder / "STOP").touch()
    run.wait_for_end("preempted")
    run.wait_until_over("FAILED")
    assert slurm.job(run.job)["Restarts"] == "0"
    run.submit()
    run.end_like(undisturbed, "preempted", "finished")
    assert run.events("end")[0]["step"] < 6 + SAVE_INTERVAL


def test_an_array_of_four_two_at_a_time(slurm, slurm_data, tmp_path):
    """One fails for good; the others do not notice."""
    alone = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    paths = []
    for number in range(4):
        training = {"train_iters": 8, "seed": number + 1, "on_nonfinite": "fail"}
        optimizer = {"lr": 1e30, "min_lr": 1e29} if number == 1 else {}
        config = make_config(
            f"member{number}", tmp_path, slurm_data, parallel=alone, training=training, optimizer=optimizer
        )
        paths.append(tmp_path / f"member{number}.yaml")
        save_config(config, paths[-1])
    (tmp_path / "members.txt").write_text("".join(f"{path}\n" for path in paths))
    (tmp_path / "cluster.yaml").write_text("gpus_per_node: 0\nprocesses_per_node: 1\ncpus_per_process: 1\n")
    arguments = ("--array", str(tmp_path / "members.txt"), "--max-concurrent", "2", "--time", "30")
    submit(slurm, *arguments, "--cluster", str(tmp_path / "cluster.yaml"), "--nodes", "1")
    runs = [SlurmRun(slurm, load_config(path)) for path in paths]
    for run in runs:
        wait_for(lambda run=run: run.over(), "the end of all", 500, lambda run=run: run.outputs())
    wait_for(lambda: not slurm.jobs(), "the array to be gone", 60)
    assert [run.statuses()[-1] for run in runs] == ["finished", "failed", "finished", "finished"]
    assert [(run.folder / "why.txt").exists() for run in runs] == [False, True, False, False]
    assert [run.step for run in runs if run is not runs[1]] == [8, 8, 8]
    times = sorted(
        (event["time"], event["event"] == "start") for run in runs for event in run.events() if event["event"] != "stop"
    )
    running = [sum(1 if start else -1 for _, start in times[: count + 1]) for count in range(len(times))]
    assert max(running) == 2, times
