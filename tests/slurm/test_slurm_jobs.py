"""Jobs on a real Slurm cluster: a plain one, and one that is disturbed three times."""

from __future__ import annotations

import json
import re
import resource
import statistics
import sys
import time

import pytest

from plt_megatron.run_folder.folder import save_config
from tests.running import ROOT
from tests.running import run as run_command
from tests.slurm.runs import STEPS, SlurmRun, make_config, numbers, submit, train_locally


@pytest.mark.parametrize("processes_per_node", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_nodes_train_as_the_same_layout_does_locally(slurm, slurm_data, warm_python, tmp_path, processes_per_node):
    alone, config = (
        make_config(name, tmp_path, slurm_data, parallel={"tensor_model_parallel_size": processes_per_node})
        for name in ("alone", "plain")
    )
    undisturbed = train_locally(alone, warm_python)
    save_config(config, tmp_path / "plain.yaml")
    profile = tmp_path / "cluster.yaml"
    profile.write_text(f"gpus_per_node: 0\nprocesses_per_node: {processes_per_node}\ncpus_per_process: 1\n")
    run = SlurmRun(slurm, config)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["--cluster", str(profile), "--nodes", "2", "--time", "30", "--requeue"]
    submit(slurm, str(tmp_path / "plain.yaml"), *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of a CPU's time, which other work on this machine does not lengthen; the clock's is a benchmark's.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    (run.job,) = json.loads((run.folder / "submissions.jsonl").read_text())["job_ids"]
    with (run.folder / "code" / "plt_megatron" / "train" / "__init__.py").open("a") as file:
        file.write("print('this is the snapshot')\n")  # the job takes seconds to come that far
    run.wait_for_end("finished")
    run.wait_until_over()
    assert numbers(run.folder) == undisturbed
    assert not (run.folder / "why.txt").exists()
    # Preflight has measured the link between the two nodes.
    assert run.said("all-reduce over 2 processes") == run.said("point to point") == 1
    # The ranks run the code as it was submitted, though the job runs in the checkout.
    ranks = re.findall(r" rank (\d): this is the snapshot$", (run.folder / "logs" / "merged.log").read_text(), re.M)
    assert sorted(ranks) == [str(rank) for rank in range(2 * processes_per_node)]
    # Each rank has a log of its own, and the merged one holds the same lines whole.
    logs = run.folder / "logs"
    own = [line for rank in range(len(ranks)) for line in (logs / f"rank-{rank:04d}.log").read_text().splitlines()]
    merged = [
        line for line in (logs / "merged.log").read_text().splitlines() if re.search(r" attempt 1 rank \d: ", line)
    ]
    assert sorted(own) == sorted(merged)
    assert sum(f"step {STEPS}/{STEPS}" in line for line in merged) == 1
    # What a job would refuse on its checkpoint, the login node refuses.
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), str(tmp_path / "plain.yaml"), *options]
    for settings, words in (([], "is finished"), (["optimizer.lr=0.5", "--accept-changes"], "optimizer.lr 0.")):
        assert words in run_command([*command, *settings], status=2, env=slurm.environment).stderr


REFUSED = {  # what is wrong -> options and overrides, words of the line
    "a partition that is not there": (["--partition=mian"], "--partition mian: no such partition; did you mean main?"),
    "too many GPUs a node": (["--gpus-per-node=8"], "--gpus-per-node 8: the nodes of partition main have 2 GPUs"),
    "GPUs of another kind": (["--gpus-per-node=a100:2"], "partition main has no such nodes; its GPUs: h100"),
    "too many nodes": (["--nodes=4"], "--nodes 4: partition main has 3 nodes"),
    "a layout that does not divide": (
        ["--nodes=3", "--gpus-per-node=1"],
        "3 processes: tensor 2 x pipeline 2 parallel needs a multiple of 4",
    ),
    "data that is not there": (["data.sources=[{path: gone}]"], "path: gone.bin and gone.idx not found"),
    "memory that will not fit": (
        ["model.num_layers=64", "model.ffn_hidden_size=16_000_000", "checkpoint.enabled=false"],
        "memory: a rank needs",
    ),
    "no time for a checkpoint interval": (
        ["training.train_iters=1_000_000_000", "checkpoint.save_interval=1_000_000_000"],
        "--time 00:30:00 is too short for one checkpoint interval: 1,000,000,000 steps",
    ),
}


def test_what_cannot_run_is_refused_in_one_line_each(slurm, slurm_data, tmp_path):
    save_config(make_config("refused", tmp_path, slurm_data), tmp_path / "run.yaml")
    for what, (words, line) in REFUSED.items():
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), str(tmp_path / "run.yaml"), "--nodes=2"]
        done = run_command([*command, "--time=30", *words], status=2, env=slurm.environment)
        assert done.stdout == "", (what, done)
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and line in done.stderr, (what, done)
    assert not slurm.jobs() and not (tmp_path / "refused").exists()


@pytest.mark.bench
def test_queued_within_three_seconds(slurm, slurm_data, tmp_path, capsys):
    """From the command to the queued job; what sbatch alone takes is shown, and is not taken off."""
    bare = tmp_path / "bare.sh"
    bare.write_text("#!/bin/bash\ntrue\n")
    seconds: dict[str, list[float]] = {"submit.py": [], "sbatch": []}
    for number in range(5):
        save_config(make_config(f"quick{number}", tmp_path, slurm_data), tmp_path / "quick.yaml")
        started = time.monotonic()
        submit(slurm, str(tmp_path / "quick.yaml"), "--cluster=cpu", "--nodes=2", "--time=30")
        seconds["submit.py"].append(time.monotonic() - started)
        (job,) = json.loads((tmp_path / f"quick{number}" / "submissions.jsonl").read_text())["job_ids"]
        assert slurm.state_of(job) in ("PENDING", "RUNNING")
        slurm.run("scancel", job)
        started = time.monotonic()
        job = slurm.sbatch(bare, "--hold", "--output=/dev/null")
        seconds["sbatch"].append(time.monotonic() - started)
        slurm.run("scancel", job)
    with capsys.disabled():
        for what, each in seconds.items():
            print(f"\n{what}: median {statistics.median(each):.2f} s of {', '.join(f'{s:.2f}' for s in each)}", end=" ")
    assert statistics.median(seconds["submit.py"]) < 3, seconds


@pytest.mark.slow
def test_a_killed_rank_a_warning_and_a_controller_that_is_gone(slurm, slurm_data, warm_python, tmp_path):
    """Three faults in the course of one run, of one process a node: processes take seconds to start."""
    alone, config = (
        make_config(name, tmp_path, slurm_data, parallel={"tensor_model_parallel_size": 1})
        for name in ("alone", "disturbed")
    )
    undisturbed = train_locally(alone, warm_python)
    run = SlurmRun(slurm, config).prepare(processes_per_node=1)
    run.submit()
    run.kill_rank(1, step=5)  # started again in the same allocation
    run.wait_for_attempt(2)
    assert slurm.job(run.job)["Restarts"] == "0"
    run.warn(step=9)  # as before the time limit: saved, and requeued
    run.wait_for_attempt(3)
    with run.paused(14):
        slurm.control("controller-off")
    try:
        run.wait_for_end("failed", "preempted", "finished")  # it needs none
    finally:
        slurm.control("controller-on")
    run.wait_until_over()  # Slurm hears of the end when there is one again
    assert slurm.job(run.job)["Restarts"] == "1"
    run.check(undisturbed)
    killed = run.events("end")[0]
    assert killed["failure"]["rank"] == 1 and "SIGKILL" in killed["reason"] and killed["failure"]["node"] == "node2"
