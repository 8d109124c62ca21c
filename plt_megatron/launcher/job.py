"""The job: what it asked for (`job.yaml` of the run's folder), and its allocation, from Slurm's variables."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping
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


# Below Linux's ephemeral ports, which begin at 32768: no outgoing connection takes one of these.
_FIRST_PORT, _PORTS_PER_JOB, _SLOTS = 16000, 4, 4000
_PART = re.compile(r"([^\[\],]*)\[([^\]]*)\]|([^\[\],]+)")


@dataclass(frozen=True)
class Allocation:
    """A job's nodes, and which of them this process runs on.

    Attributes:
        job_id: Slurm's number.
        scheduler_id: identifies this job alone to `scontrol`; for an array's member `ARRAY_TASK`, since one of them has
            the array's own number.
        restart_count: how often Slurm has requeued the job.
        nodes: by name, in Slurm's order.
        node_index: this node's place among them.
    """

    job_id: int
    scheduler_id: str
    restart_count: int
    nodes: tuple[str, ...]
    node_index: int

    @property
    def node(self) -> str:
        """This node's name."""
        return self.nodes[self.node_index]

    @property
    def first_node(self) -> str:
        """The node that the others connect to."""
        return self.nodes[0]

    @property
    def is_first(self) -> bool:
        """Whether this is the node that the others connect to."""
        return self.node_index == 0

    @property
    def launcher_port(self) -> int:
        """Where the first node's launcher listens for the others."""
        return _FIRST_PORT + _PORTS_PER_JOB * (self.job_id % _SLOTS)

    def rendezvous_port(self, attempt: int) -> int:
        """`MASTER_PORT` of one attempt's processes; each attempt has its own."""
        return self.launcher_port + 1 + attempt % (_PORTS_PER_JOB - 1)


def read_allocation(env: Mapping[str, str] | None = None) -> Allocation:
    """The allocation of the job this process is in.

    Raises:
        UserError: this is not a Slurm job.
    """
    env = os.environ if env is None else env
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
    )


def expand_nodes(text: str) -> list[str]:
    """`"gpu[08-10,12],login1"` as a list of names, like `scontrol show hostnames`, which a container
    lacks.

    Raises:
        UserError: it is not a list of nodes.
    """
    names: list[str] = []
    for item in _split(text):
        pieces = _PART.findall(item)
        if not pieces or "".join(p[2] or f"{p[0]}[{p[1]}]" for p in pieces) != item:
            raise UserError(f"'{text}' is not a list of nodes")
        choices = [[literal] if literal else [prefix + number for number in _numbers(ranges, text)]
                   for prefix, ranges, literal in pieces]  # fmt: skip
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    return re.split(r",(?![^\[]*\])", text)


def _numbers(ranges: str, text: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise UserError(f"'{text}' is not a list of nodes")
        first, last = match[1], match[2] or match[1]
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
