"""Slurm's commands and their output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.slurm.times import parse_duration

_TIMEOUT_SECONDS = 20
# The environment would add options to ours: the job script is meant to be complete. These two choose the cluster.
_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
    *("OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"),
)


class SlurmError(UserError):
    """Slurm is missing, or refuses a request; one line."""


@dataclass(frozen=True)
class NodeGroup:
    """Identical nodes of one partition."""

    count: int
    cpus: int
    memory_mib: int
    gpus: int
    gpu_types: tuple[str, ...]  # as the cluster's administrators named them; may be empty


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo shows it. `time_limit_seconds` None: none."""

    name: str
    default: bool
    available: str  # up; down: takes jobs, starts none; drain, inactive (or inact): takes none
    time_limit_seconds: int | None
    groups: tuple[NodeGroup, ...]

    @property
    def takes_jobs(self) -> bool:
        return self.available in ("up", "down")

    @property
    def nodes(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def gpus(self) -> int:
        """GPUs of its largest nodes."""
        return max((group.gpus for group in self.groups), default=0)

    @property
    def cpus(self) -> int:
        """CPUs of its largest nodes."""
        return max((group.cpus for group in self.groups), default=0)


@dataclass(frozen=True)
class Job:
    """A job, or one member of an array, as squeue shows it."""

    id: str  # of a member of an array: ARRAY_TASK
    state: str  # RUNNING, PENDING, COMPLETED, ...
    reason: str  # why it is pending or has failed; empty: no reason
    elapsed: str
    limit: str
    start: str  # actual or expected start; N/A
    nodes: str
    name: str

    @property
    def active(self) -> bool:
        """Whether it is running or pending."""
        return self.state not in _ENDED


def is_installed() -> bool:
    """Whether this machine can submit."""
    return shutil.which("sbatch") is not None


def partitions() -> list[Partition]:
    """All partitions that this user sees, in sinfo's order.

    Raises:
        SlurmError: Slurm does not answer.
    """
    lines = _ask("sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%D|%c|%m|%G").splitlines()
    return read_partitions(lines)


def read_partitions(lines: Sequence[str]) -> list[Partition]:
    """Partitions from lines of sinfo, one for each kind of node in each partition."""
    found: dict[str, tuple[str, str, list[NodeGroup]]] = {}
    for line in lines:
        fields = line.split("|", 6)
        if len(fields) != 7:
            continue
        name, available, limit, count, cpus, memory, gres = fields
        _, _, groups = found.setdefault(name, (available, limit, []))
        gpus, types = _gpus(gres)
        groups.append(NodeGroup(_integer(count), _integer(cpus), _integer(memory), gpus, types))
    return [
        Partition(name.removesuffix("*"), name.endswith("*"), available, parse_duration(limit), tuple(groups))
        for name, (available, limit, groups) in found.items()
    ]


def _gpus(gres: str) -> tuple[int, tuple[str, ...]]:
    """`gpu:h100:8(S:0-1),nic:2` as 8 and ("h100",)."""
    count, types = 0, []
    for match in re.finditer(r"(?:^|,)gpu(?::([^:,()]+))??(?::(\d+))?(?=[(,]|$)", gres):
        count += int(match[2] or 1)
        if match[1]:
            types.append(match[1])
    return count, tuple(types)


def _integer(text: str) -> int:
    """`64+` (at least 64) as 64."""
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def my_jobs() -> list[Job]:
    """This user's jobs, with those that ended a short while ago, members of arrays one by one.

    Raises:
        SlurmError: Slurm does not answer.
    """
    text = _ask("squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i|%T|%r|%M|%l|%S|%N|%j")
    return read_jobs(text.splitlines())


def read_jobs(lines: Sequence[str]) -> list[Job]:
    """Jobs from lines of squeue. The reason `None` is none: Slurm has not looked at it, or nothing failed."""
    found = []
    for line in lines:
        fields = line.split("|", 7)
        if len(fields) == 8:
            number, state, reason, *others = fields
            found.append(Job(number, state, "" if reason == "None" else reason, *others))
    return found


def submit(script: Path) -> str:
    """Submit a script with sbatch; the job's id.

    Raises:
        SlurmError: with sbatch's reason.
    """
    answer = _ask("sbatch", "--parsable", str(script)).strip().splitlines()
    job_id = answer[-1].partition(";")[0] if answer else ""
    if not re.fullmatch(r"\d+", job_id):
        raise SlurmError(f"sbatch returned {' '.join(answer)!r} instead of a job id")
    return job_id


def _ask(*command: str) -> str:
    """A command's output."""
    name = command[0]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
            env=environment(),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise SlurmError(f"{name} is not installed here: submit on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{name} did not answer in {_TIMEOUT_SECONDS} s: is Slurm's controller down?") from None
    if done.returncode:
        words = [line.removeprefix(f"{name}: ").removeprefix("error: ") for line in done.stderr.splitlines() if line]
        raise SlurmError(f"{name}: {'; '.join(words) or f'exit status {done.returncode}'}")
    return done.stdout


def environment() -> dict[str, str]:
    """This process's variables without those that change what Slurm's commands do."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or not name.startswith(("SLURM_", "SBATCH_", "SLURMD_", "SQUEUE_", "SINFO_"))
    }
