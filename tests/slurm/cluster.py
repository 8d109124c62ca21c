"""The tests' Slurm cluster (cluster.sh) from Python."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

from tests.running import run, wait_for

SCRIPT = Path(__file__).with_name("cluster.sh")


class SlurmCluster:
    """Three nodes of eight CPUs, as Slurm is told.

    Args:
        state: the folder of the cluster's files.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = os.environ | {"SLURM_CONF": str(state / "slurm.conf"), "CLUSTER_STATE": str(state)}

    @staticmethod
    def reason_for_none() -> str | None:
        """Why no cluster can run on this machine."""
        done = subprocess.run([str(SCRIPT), "check"], capture_output=True, text=True, check=False, timeout=240)
        return done.stdout.strip() or done.stderr.strip() if done.returncode else None

    def control(self, *arguments: str) -> str:
        """A verb of cluster.sh."""
        return self.run(str(SCRIPT), *arguments)

    def is_running(self) -> bool:
        """Whether it has been started and not taken down since. A node or two may be off."""
        conf = self.state / "slurm.conf"
        return conf.exists() and not conf.read_text().startswith("# stopped")

    def run(self, *command: str, **environment: str) -> str:
        """A command with the cluster in its environment; its output."""
        return run(command, env=self.environment | environment).stdout

    def sbatch(self, script: Path, *options: str) -> str:
        """Submit; the job's id."""
        return self.run("sbatch", "--parsable", *options, str(script)).strip()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def state_of(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for_state(self, job: str, *states: str, seconds: float = 300) -> None:
        wait_for(lambda: self.state_of(job) in states, f"job {job} to be {' or '.join(states)}", seconds,
                 lambda: self.job(job), interval=0.3)  # fmt: skip

    def jobs(self) -> list[str]:
        """Ids of all jobs that are not over."""
        return self.run("squeue", "--noheader", "--format=%A").split()

    def clear(self) -> None:
        """Cancel what is left, and have every node up and idle."""
        if self.jobs():
            self.run("scancel", "--user=root")
            # What does not listen need not be waited for. It fails for a job that has ended by now.
            subprocess.run(["scancel", "--signal=KILL", "--full", *self.jobs()], env=self.environment, check=False)
            wait_for(lambda: not self.jobs(), "the jobs to be gone", 60, interval=0.3)
        for node in self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N").split():
            self.control("node-on", node)
        wait_for(self._all_idle, "all nodes to be idle", 60, interval=0.3)

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
        return set(states) == {"idle"}


def processes() -> dict[int, tuple[list[bytes], list[bytes]]]:
    """Command and environment of every other process of this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
                found[int(folder.name)] = (command.split(b"\0"), environment.split(b"\0"))
    return found
