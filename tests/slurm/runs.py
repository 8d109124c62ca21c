"""Runs of the fault tests: made as plt submit makes them, watched while they run, compared bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plt_megatron.config.layout import layout_of
from plt_megatron.config.schema import DataConfig, RunConfig
from plt_megatron.launcher.job import JobSettings
from plt_megatron.run_folder.folder import RunFolder, save_config
from plt_megatron.slurm.profile import ClusterProfile
from plt_megatron.slurm.run_files import job_name, write_run
from plt_megatron.slurm.script import TEMPLATE, Script
from tests.distributed.training_jobs import run_config
from tests.distributed.whole_runs import MACHINE_FIELDS, last_step
from tests.running import ROOT, run, wait_for
from tests.slurm.cluster import SlurmCluster, processes

STEPS, SAVE_INTERVAL = 24, 4
LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "distributed_timeout_minutes": 2.0,
    "distributed_timeout_seconds_after_init": 60.0,  # longer than any test holds a run up
}


def make_config(name: str, folder: Path, data: DataConfig, **changes: Any) -> RunConfig:
    """TP 2 x PP 2, a few steps with a checkpoint every few."""
    sections: dict[str, Any] = {
        "parallel": LAYOUT,
        "training": {"train_iters": STEPS, "threads_per_process": 1},
        "checkpoint": {"save_interval": SAVE_INTERVAL},
        "validation": {"interval": 0, "iters": 0},
    }
    for section, fields in changes.items():
        sections[section] = {**sections.get(section, {}), **fields}
    return run_config(name, folder, data, **sections)


def train_locally(config: RunConfig, python: str = sys.executable) -> list[dict[str, Any]]:
    """The same layout by plt train; its metrics."""
    path = Path(config.output_dir) / f"{config.name}.yaml"
    save_config(config, path)
    command = [python, str(ROOT / "launch" / "train.py"), str(path)]
    run(command)
    return numbers(Path(config.output_dir) / config.name)


def numbers(run: Path) -> list[dict[str, Any]]:
    """The records of a run without what a clock decides; of several of one step the last counts."""
    found = {}
    for record in RunFolder(run).records():
        found[record["kind"], record["step"], record.get("loop_count")] = {
            name: value for name, value in record.items() if name not in MACHINE_FIELDS
        }
    return list(found.values())


def submit(cluster: SlurmCluster, *arguments: str) -> str:
    """plt submit; what it prints."""
    return cluster.run(sys.executable, str(ROOT / "launch" / "submit.py"), *arguments)


class SlurmRun:
    """A run on the cluster. `prepare` or plt submit fills its folder."""

    def __init__(self, cluster: SlurmCluster, config: RunConfig) -> None:
        self.cluster, self.config = cluster, config
        self.folder = Path(config.output_dir) / config.name
        self.last_rank = layout_of(config).world_size - 1
        self.job = ""

    def prepare(self, **settings: Any) -> SlurmRun:
        """Fill its folder for two nodes of two processes, as submit.py does.

        Args:
            settings: of the job, where they are not these.
        """
        usual = {
            "job_name": job_name(self.folder, self.config.name),
            "nodes": 2,
            "processes_per_node": 2,
            "cpus_per_process": 1,
            "gpus_per_node": 0,
            "time_limit_seconds": 3600,
            "python": sys.executable,
            "requeue": True,
        }
        job = JobSettings(**(usual | settings))
        text = Script(job, ClusterProfile(), self.folder, ROOT).render((ROOT / TEMPLATE).read_text())
        write_run(self.config, self.folder, job, text, root=ROOT)
        return self

    def submit(self, *options: str) -> str:
        """Submit its job.sbatch as a person would; the job's id."""
        self.job = self.cluster.sbatch(self.folder / "job.sbatch", *options)
        return self.job

    @property
    def step(self) -> int:
        """The last step in its metrics."""
        return last_step(self.config)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        return [entry for entry in RunFolder(self.folder).attempts() if event in (None, entry["event"])]

    def statuses(self) -> list[str]:
        return [entry["status"] for entry in self.events("end")]

    def over(self) -> bool:
        """Whether it has finished or was given up."""
        return "finished" in self.statuses() or bool(self.events("stop"))

    def why(self) -> str:
        return (self.folder / "why.txt").read_text()

    def outputs(self) -> str:
        """Everything that its jobs have printed, for the message of a failed test."""
        texts = [path.read_text(errors="replace") for path in sorted((self.folder / "logs").glob("*.out"))]
        merged = self.folder / "logs" / "merged.log"
        texts.append(merged.read_text(errors="replace")[-6000:] if merged.exists() else "")
        return "\n".join([*texts, json.dumps(self.events(), indent=1)])

    def wait_for_step(self, step: int, seconds: float = 400) -> None:
        wait_for(lambda: self.step >= step, f"step {step}", seconds, self.outputs)

    def wait_for_attempt(self, attempt: int, seconds: float = 300) -> None:
        """Until an attempt has begun."""
        wait_for(lambda: len(self.events("start")) >= attempt, f"attempt {attempt}", seconds, self.outputs)

    def wait_for_end(self, *statuses: str, seconds: float = 500) -> None:
        """Until the attempts have ended in this way, one after another."""
        wait_for(lambda: len(self.events("end")) >= len(statuses), f"the ends {statuses}", seconds, self.outputs)
        assert self.statuses() == list(statuses), self.outputs()

    def wait_until_over(self, *states: str, seconds: float = 200) -> None:
        """Until its job has left the cluster in one of these states."""
        self.cluster.wait_for_state(self.job, *(states or ("COMPLETED",)), seconds=seconds)

    def rank_process(self, rank: int) -> int:
        """The id of a rank's process; nodes are namespaces of this machine."""
        return self._process(["plt_megatron.train.main", str(self.folder / "config.yaml")], [f"RANK={rank}"])

    def launcher_process(self, node: str) -> int:
        """The id of a node's launcher."""
        return self._process(["node", str(self.folder)], [f"SLURMD_NODENAME={node}", "SLURM_STEP_ID=0"])

    def _process(self, command: list[str], environment: list[str]) -> int:
        """The Python process with these words in its command and its environment."""
        for pid, (words, variables) in processes().items():
            if b"python" in words[0] and set(map(str.encode, command)) <= set(words):
                if set(map(str.encode, environment)) <= set(variables):
                    return pid
        raise AssertionError(f"no process of {command}, {environment}: {self.outputs()}")

    def kill_rank(self, rank: int, step: int) -> None:
        """SIGKILL a rank once the run has come to a step."""
        self.wait_for_step(max(1, step - 2))
        process = self.rank_process(rank)
        self.wait_for_step(step)
        os.kill(process, signal.SIGKILL)

    @contextlib.contextmanager
    def paused(self, step: int) -> Iterator[None]:
        """Pause the run at a step or soon after, so that fast machines do not finish before the fault."""
        self.wait_for_step(max(1, step - 2))
        process = self.rank_process(self.last_rank)
        self.wait_for_step(step)
        os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

    def said(self, text: str) -> int:
        """How often the launchers have said something."""
        path = self.folder / "logs" / "merged.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return sum("launcher" in line and text in line for line in lines)

    def disturb(self, step: int, *command: str) -> None:
        """Have Slurm ask the job to stop at a step, by a command, and see that the request arrives."""
        before = self.said("asked to stop")
        with self.paused(step):
            self.cluster.run(*command)
            wait_for(lambda: self.said("asked to stop") > before, "the request to arrive", 30, self.outputs)

    def warn(self, step: int) -> None:
        """Send what Slurm sends before the time limit."""
        self.disturb(step, "scancel", "--batch", "--signal=USR1", self.job)

    def end_like(self, undisturbed: list[dict[str, Any]], *statuses: str) -> None:
        """Wait until the attempts have ended in this way and the job is over, and check the run."""
        self.wait_for_end(*statuses)
        self.wait_until_over()
        self.check(undisturbed)

    def check(self, undisturbed: list[dict[str, Any]]) -> None:
        """The metrics are an undisturbed run's, and no attempt lost more than the steps since its last checkpoint."""
        assert numbers(self.folder) == undisturbed, self.outputs()
        for end in self.events("end"):
            assert end["step"] - end["checkpoint"] <= SAVE_INTERVAL, end
        resumed = re.findall(r"resumed at step (\d+)", (self.folder / "logs" / "rank-0000.log").read_text())
        saved = [end["checkpoint"] for end in self.events("end")[:-1]]
        assert [int(step) for step in resumed] == [step for step in saved if step]
