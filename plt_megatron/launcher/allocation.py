"""The job's allocation, read from Slurm's environment variables."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from plt_megatron.errors import UserError

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
