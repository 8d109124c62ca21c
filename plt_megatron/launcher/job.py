"""A job's settings, from `job.yaml` in the run's folder, and its allocation, from Slurm's variables."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from plt_megatron.config import yaml_nodes
from plt_megatron.config.fields import Count, PositiveCount, Range, WholeSeconds
from plt_megatron.config.loader import check, load
from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import write_text
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm.client import LONGEST_MARGIN, expand_nodes

# Below Linux's ephemeral ports, which begin at 32768, so that no outgoing connection takes one of these.
_FIRST_PORT, _PORTS_PER_JOB, _SLOTS = 16000, 4, 4000
COPY = "PLT_COPY_"  # prefix of copies of variables that srun or an image may set to something else
_Margin = Annotated[int, Range(1, LONGEST_MARGIN)]


@dataclass(frozen=True, kw_only=True)
class JobSize:
    """A job's share of a cluster."""

    nodes: PositiveCount
    processes_per_node: PositiveCount
    cpus_per_process: PositiveCount
    gpus_per_node: Count  # 0: a CPU cluster

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def probes_per_node(self) -> int:
        """Processes per node of the preflight check: one per GPU, or one on a node without GPUs."""
        return self.processes_per_node if self.gpus_per_node else 1


@dataclass(frozen=True, kw_only=True)
class JobHandling:
    """Settings of a cluster's profile for all of its jobs: their environment, and how failures are handled."""

    signal_margin_seconds: _Margin = 300  # how long before the time limit the job is told to save
    max_restarts: Count = 1  # within one allocation
    max_exclusions: Count = 2  # times the job may be requeued without bad nodes
    max_requeues_without_progress: Count = 1  # failures without progress after which the run is given up
    scratch: str | None = None  # fast folder local to each node, the job's TMPDIR; $NAMES are expanded on the node
    environment: dict[str, str] = field(default_factory=dict)  # NCCL_SOCKET_IFNAME and the like; $NAMES are expanded


@dataclass(frozen=True, kw_only=True)
class JobSettings(JobHandling, JobSize):
    """Settings of a run's Slurm job: what it requests, and how it handles failures."""

    job_name: str  # of a single job; jobs in an array have the array's name
    time_limit_seconds: WholeSeconds
    python: str  # interpreter of the ranks; inside the container, if there is one
    requeue: bool = False
    chain: PositiveCount = 1  # number of jobs, each starting when the one before has ended
    cluster: str | None = None


def fields_of(kind: type, whole: Any) -> dict[str, Any]:
    """Return the fields of an object that belong to one of its base classes."""
    return {field.name: getattr(whole, field.name) for field in dataclasses.fields(kind)}


def save_settings(settings: JobSettings, run: Path) -> None:
    write_text(RunFolder(run).job_file, yaml_nodes.dump(dataclasses.asdict(settings)))


def load_settings(run: Path) -> JobSettings:
    """Read `RUN/job.yaml`. Raises `UserError` if it is missing or not YAML, or if a setting is unknown, missing, of the
    wrong type or out of range."""
    path = RunFolder(run).job_file
    if not path.is_file():
        raise UserError(f"{path} does not exist; plt submit writes it")
    settings = load(JobSettings, path)
    check(settings)
    return settings


@dataclass(frozen=True)
class Allocation:
    """A job's nodes, and which of them this process runs on."""

    job_id: int  # Slurm's job number
    # The id that names only this job to `scontrol`; for a member of an array `ARRAY_TASK`, since one member has the
    # number of the array itself.
    scheduler_id: str
    restart_count: int  # how often Slurm has requeued the job
    nodes: tuple[str, ...]  # names, in Slurm's order
    node_index: int  # this node's index in `nodes`
    end_time: float = math.inf  # when the time limit ends the job, seconds since 1970; infinite if Slurm does not say

    @property
    def node(self) -> str:
        return self.nodes[self.node_index]

    @property
    def first_node(self) -> str:
        """Name of the node that the others connect to."""
        return self.nodes[0]

    @property
    def launcher_port(self) -> int:
        """Port on which the first node's launcher listens for the others."""
        return _FIRST_PORT + _PORTS_PER_JOB * (self.job_id % _SLOTS)

    def rendezvous_port(self, attempt: int) -> int:
        """Return `MASTER_PORT` for the processes of one attempt; successive attempts use different ports."""
        return self.launcher_port + 1 + attempt % (_PORTS_PER_JOB - 1)


def read_allocation(env: Mapping[str, str] = os.environ) -> Allocation:
    """Read the allocation of the job that this process runs in. Raises `UserError` if this is not a Slurm job."""
    try:
        job_id = int(env["SLURM_JOB_ID"])
        nodes = tuple(expand_nodes(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]))
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set: this runs inside a Slurm job; plt submit submits one") from None
    name = env.get("SLURMD_NODENAME")
    index = nodes.index(name) if name in nodes else int(env.get("SLURM_NODEID", "0"))
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return Allocation(
        job_id=job_id,
        scheduler_id=f"{array}_{task}" if array and task else str(job_id),
        restart_count=int(env.get("SLURM_RESTART_COUNT", "0")),
        nodes=nodes,
        node_index=index,
        end_time=float(env.get("SLURM_JOB_END_TIME", math.inf)),
    )
