"""`job.yaml` of a run folder: the job's settings, for use in the job and afterwards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from plt_megatron.config import yaml_nodes
from plt_megatron.config.fields import Count, PositiveCount, WholeSeconds
from plt_megatron.config.loader import check, load
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import write_text
from plt_megatron.run_folder.folder import RunFolder

SCRATCH = "PLT_SCRATCH"  # the variable with the node's `scratch` folder


@dataclass(frozen=True)
class JobSettings:
    """What a run's Slurm job requests, and how it handles failures."""

    job_name: str  # of the single job; in an array the jobs carry the array's name
    nodes: PositiveCount
    processes_per_node: PositiveCount
    cpus_per_process: PositiveCount
    gpus_per_node: Count  # 0: a CPU cluster
    time_limit_seconds: WholeSeconds
    python: str  # interpreter of the ranks; inside the container, if there is one
    signal_margin_seconds: WholeSeconds = 300  # how long before the time limit the job is told to save
    requeue: bool = False
    chain: PositiveCount = 1  # jobs that follow one another, each when the one before has ended
    max_restarts: Count = 1  # inside one allocation
    max_exclusions: Count = 2  # nodes the job may be requeued without
    max_requeues_without_progress: Count = 1  # further attempts that made no step end the run
    cluster: str | None = None
    scratch: str | None = None  # TMPDIR of the job on each node; $NAMES in it are the node's
    environment: dict[str, str] = field(default_factory=dict)  # network and other variables of the profile

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.processes_per_node


def save_settings(settings: JobSettings, run: Path) -> None:
    """Write `RUN/job.yaml`."""
    write_text(RunFolder(run).job_file, yaml_nodes.dump(dataclasses.asdict(settings)))


def load_settings(run: Path) -> JobSettings:
    """Read `RUN/job.yaml`.

    Raises:
        UserError: it is missing or not YAML, or a setting is unknown, missing, of the wrong type or out of its range.
    """
    path = RunFolder(run).job_file
    if not path.is_file():
        raise UserError(f"there is no {path}; plt submit writes it")
    settings = load(JobSettings, path)
    check(settings)
    return settings
