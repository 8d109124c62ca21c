"""Slurm's commands, their output and their notation: for submitting, and for a job's questions about itself."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.errors import UserError

_TIMEOUT_SECONDS = 20
# A job's questions, which nobody would repeat for it.
_TRIES, _PAUSE_SECONDS, _PATIENCE_SECONDS = 4, 5.0, 60
# The environment would add options to ours: the job script is meant to be complete. These two choose the cluster.
_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
    *("OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"),
)
# States of a job that Slurm queues again, or will: its processes are about to end.
_LEAVING = ("COMPLETING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_FORMS = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",  # MM and MM:SS
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
_UNIT_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_NODES = re.compile(r"([^\[\],]*)\[([^\]]*)\]|([^\[\],]+)")


class SlurmError(UserError):
    """Slurm is missing, does not answer, or refuses a request; one line."""


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


def submit(script: Path, *options: str) -> str:
    """Submit a script with sbatch, and options that go before its own; the job's id.

    Raises:
        SlurmError: with sbatch's reason.
    """
    answer = _ask("sbatch", "--parsable", *options, str(script)).strip().splitlines()
    job_id = answer[-1].partition(";")[0] if answer else ""
    if not re.fullmatch(r"\d+", job_id):
        raise SlurmError(f"sbatch returned {' '.join(answer)!r} instead of a job id")
    return job_id


def _ask(*command: str, tries: int = 1) -> str:
    """A command's output; `tries`: how often to ask a controller that does not answer."""
    name = " ".join(command[: 2 if command[0] == "scontrol" else 1])
    problem = ""
    for attempt in range(tries):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_SECONDS if tries == 1 else _PATIENCE_SECONDS,
                check=False,
                env=environment(),
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            raise SlurmError(f"{command[0]} is not installed here; it is on a cluster's login nodes") from None
        except subprocess.TimeoutExpired as error:
            problem = f"{name} did not answer in {error.timeout:.0f} s: is Slurm's controller down?"
            continue
        if done.returncode == 0:
            return done.stdout
        prefix = f"{command[0]}: "
        words = [line.removeprefix(prefix).removeprefix("error: ") for line in done.stderr.splitlines() if line]
        problem = f"{name}: {'; '.join(words) or f'exit status {done.returncode}'}"
        if "Unable to contact" not in done.stderr and "timed out" not in done.stderr:
            break
    raise SlurmError(problem)


def environment() -> dict[str, str]:
    """This process's variables without those that change what Slurm's commands do."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or not name.startswith(("SLURM_", "SBATCH_", "SLURMD_", "SQUEUE_", "SINFO_"))
    }


# Its notation of times and of nodes.


def parse_duration(text: str) -> int | None:
    """Seconds of an sbatch --time (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS); None: something else."""
    for form in _FORMS:
        match = re.fullmatch(form, text.strip(), re.ASCII)
        if match:
            return sum(_UNIT_SECONDS[unit] * int(count) for unit, count in match.groupdict().items() if count)
    return None


def time_limit(text: str, option: str = "--time") -> int:
    """`parse_duration` of a limit, above zero.

    Raises:
        UserError: it is none.
    """
    seconds = parse_duration(text)
    if not seconds:
        raise UserError(f"{option} {text}: expected a time as in 24:00:00, 90 (minutes) or 2-12:00:00 (days-hours)")
    return seconds


def time_option(seconds: float) -> str:
    """`90061.0` as `1-01:01:01`, `3661` as `01:01:01`: sbatch reads both back."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}-{clock}" if days else clock


def expand_nodes(text: str) -> list[str]:
    """`"gpu[08-10,12],login1"` as a list of names, like `scontrol show hostnames`, which a container lacks.

    Raises:
        UserError: it is not a list of nodes.
    """
    names: list[str] = []
    for item in re.split(r",(?![^\[]*\])", text):  # at the commas outside of brackets
        pieces = _NODES.findall(item)
        if not pieces or "".join(p[2] or f"{p[0]}[{p[1]}]" for p in pieces) != item:
            raise UserError(f"'{text}' is not a list of nodes")
        choices = [[literal] if literal else [prefix + number for number in _numbers(ranges, text)]
                   for prefix, ranges, literal in pieces]  # fmt: skip
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def _numbers(ranges: str, text: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise UserError(f"'{text}' is not a list of nodes")
        first, last = match[1], match[2] or match[1]
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


# What a job asks about itself.


class Scheduler:
    """Slurm's commands for one job. All raise `SlurmError` if Slurm refuses, or does not answer after several tries.

    Args:
        job: its id as `scontrol` takes it.
    """

    def __init__(self, job: str) -> None:
        self.job = job

    def ended_by_slurm(self) -> str | None:
        """The job's state if Slurm has ended it (cancelled, requeued or out of time) while this process still
        runs; None if it continues."""
        state = self._job().get("JobState")
        return state if state in (*_ENDED, *_LEAVING) else None

    def is_requeued_by_slurm(self) -> bool:
        """Whether Slurm preempts the job and queues it again by itself as soon as its processes have ended. Asked to do
        so a second time, it would start the job once more after it has finished."""
        job = self._job()
        if job.get("PreemptTime", "None") == "None" or job.get("Requeue") != "1":
            return False
        partition = _fields(_ask("scontrol", "show", "partition", job.get("Partition", ""), tries=_TRIES))
        return "REQUEUE" in partition.get("PreemptMode", "").split(",")

    def requeue(self, without: Sequence[str] = ()) -> None:
        """Have the job start again, on other nodes than `without`. Slurm then ends this job's processes.

        Raises:
            SlurmError: it was refused, or the job is queued again and `without` was refused.
        """
        job = self._job()
        changes = []
        if job.get("Requeue") == "0":  # submitted with --no-requeue, which refuses this too: lifted for once
            _ask("scontrol", "update", f"JobId={self.job}", "Requeue=1", tries=_TRIES)
            changes.append("Requeue=0")
        if without:
            excluded = job.get("ExcNodeList", "(null)")
            before = [] if excluded == "(null)" else expand_nodes(excluded)
            changes.append(f"ExcNodeList={','.join(dict.fromkeys([*before, *without]))}")
        _ask("scontrol", "requeue", self.job, tries=_TRIES)
        if changes:
            # Only a pending job takes it. This one is, and cannot start before the process that runs this has ended.
            _ask("scontrol", "update", f"JobId={self.job}", *changes, tries=_TRIES)

    def pending_after(self, script: Path) -> list[str]:
        """The ids of this user's other jobs that wait to run the same script."""
        found = []
        text = _ask("squeue", "--me", "--noheader", "--states=PENDING", "--format=%i|%o", tries=_TRIES)
        for line in text.splitlines():
            job, _, path = line.strip().partition("|")
            # With arguments, if somebody gave it some.
            if job and job != self.job and (path + " ").startswith(f"{script} "):
                found.append(job)
        return found

    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs."""
        if jobs:
            _ask("scancel", *jobs, tries=_TRIES)

    def _job(self) -> dict[str, str]:
        return _fields(_ask("scontrol", "show", "job", self.job, tries=_TRIES))


def job_at_work(jobs: Sequence[str]) -> str | None:
    """The first of these jobs that runs. None too if Slurm cannot be asked, as in a container."""
    for job in jobs:
        try:
            if Scheduler(job).ended_by_slurm() is None:
                return job
        except SlurmError:  # Slurm has forgotten it, or there is no scontrol
            continue
    return None


def _fields(text: str) -> dict[str, str]:
    """scontrol's `Name=value` by name; of values with spaces the first word."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", text))
