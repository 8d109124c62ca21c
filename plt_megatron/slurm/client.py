"""Slurm's commands, output and notation: for submitting, and for a job's queries about itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.errors import UserError, printable

LONGEST_MARGIN = 65_535  # seconds that sbatch's --signal takes
_TIMEOUT_SECONDS, _SUBMIT_SECONDS = 20, 180
# For queries from within a job, which nobody would repeat by hand: a second controller takes over after two minutes
# (SlurmctldTimeout), and an upgrade takes longer. Meanwhile jobs run on, without a time limit.
_TRIES, _PAUSE_SECONDS, _PATIENCE_SECONDS, _OUTAGE_SECONDS = 100, 5.0, 60, 300.0
_given_up: set[str] = set()  # requests of this process that have waited in vain: those after them do not
_DATABASE_TRIES = 2  # a job's node may have no way to the accounting database
# In messages of a controller that is down, starting or overloaded.
_OUTAGES = ("Unable to contact", "timed out", "Zero Bytes", "standby mode", "Protocol authentication error")
_LEAVING_SECONDS = 600.0  # for a job to end that Slurm is ending, however long it lets processes save (KillWait)
# Variables that add options to Slurm's commands: the job script is complete. Kept are those that say where the
# controller is, and who asks.
_CHANGING = ("SLURM_", "SLURMD_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_", "SACCTMGR_")
_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK_SOCKET")
_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
    *("OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"),
)
# States of a job that Slurm has requeued or will requeue: its processes are about to end.
_LEAVING = (
    *("COMPLETING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
    *("EXPEDITING", "RESV_DEL_HOLD", "STAGE_OUT"),
)
_FORMS = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",  # MM and MM:SS
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
_UNIT_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_NODES = re.compile(r"([^\[\],]*)\[([^\]]*)\]|([^\[\],]+)")


class SlurmError(UserError):
    """Slurm is missing, does not answer, or refuses a request; the message is one line."""


@dataclass(frozen=True)
class NodeGroup:
    """Identical nodes of one partition."""

    count: int
    cpus: int
    memory_mib: int
    gpus: int
    gpu_types: tuple[str, ...]  # as named by the cluster's administrators; may be empty


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo shows it. `time_limit_seconds` None: no limit."""

    name: str
    default: bool
    available: str  # up; down: accepts jobs, starts none; drain, inactive (or inact): accepts none
    time_limit_seconds: int | None
    groups: tuple[NodeGroup, ...]

    @property
    def nodes(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def gpus(self) -> int:
        """GPUs per node, of its largest nodes."""
        return max((group.gpus for group in self.groups), default=0)


@dataclass(frozen=True)
class Job:
    """A job, or one member of an array, as squeue shows it."""

    id: str  # ARRAY_TASK for a member of an array
    state: str  # RUNNING, PENDING, COMPLETED, ...
    reason: str  # why it is pending or has failed; may be empty
    elapsed: str
    limit: str
    start: str  # actual or expected start; N/A
    nodes: str
    name: str

    @property
    def active(self) -> bool:
        """Whether it is running or pending."""
        return self.state not in _ENDED


def partitions() -> list[Partition]:
    """List all partitions that this user can see, in sinfo's order. Raises `SlurmError` if Slurm does not answer."""
    found: dict[str, tuple[str, str, list[NodeGroup]]] = {}
    # One line per partition and kind of node.
    for line in _ask("sinfo", "--all", "--noheader", "--exact", "--format=%P|%a|%l|%D|%c|%m|%G").splitlines():
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
    """Parse `gpu:h100:8(S:0-1),nic:2` as 8 and ("h100",)."""
    count, types = 0, []
    for match in re.finditer(r"(?:^|,)gpu(?::([^:,()]+))??(?::(\d+))?(?=[(,]|$)", gres):
        count += int(match[2] or 1)
        if match[1]:
            types.append(match[1])
    return count, tuple(types)


def _integer(text: str) -> int:
    """Parse `64+` (at least 64) as 64."""
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def my_jobs() -> list[Job]:
    """List this user's jobs, including recently ended ones and each member of an array. Raises `SlurmError` if Slurm
    does not answer."""
    text = _ask("squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i|%T|%r|%M|%l|%S|%N|%j")
    rows = [fields for line in text.splitlines() if len(fields := line.split("|", 7)) == 8]
    # Reason `None` means no reason: not scheduled yet, or nothing failed.
    return [Job(number, state, "" if why == "None" else why, *others) for number, state, why, *others in rows]


def submit(script: Path, *options: str) -> str:
    """Submit a script with sbatch and return the job's id. `options` take precedence over the script's. Raises
    `SlurmError` with the reason if sbatch refuses."""
    # The controller may carry out what it has not answered: better to wait than to submit twice.
    answer = _ask("sbatch", "--parsable", *options, str(script), seconds=_SUBMIT_SECONDS)
    # JOB or JOB;CLUSTER, among lines of a site's wrapper.
    ids = re.findall(r"^(\d+)(?:;\S*)?[ \t]*$", answer, re.MULTILINE | re.ASCII)
    if not ids:
        raise SlurmError(f"sbatch returned {' '.join(answer.split())!r} instead of a job id")
    return str(ids[-1])


def _ask(*command: str, tries: int = 1, seconds: float | None = None) -> str:
    """Run a command and return its output. `tries`: how often to ask a controller that does not answer, for `seconds`
    each."""
    seconds = seconds or (_TIMEOUT_SECONDS if tries == 1 else _PATIENCE_SECONDS)
    name = " ".join(command[: 2 if command[0] == "scontrol" else 1])
    problem, patience = "", time.monotonic() + (0 if _given_up else _OUTAGE_SECONDS)
    for attempt in range(tries):
        if attempt and time.monotonic() > patience:
            _given_up.add(name)
            break
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
                env=environment(),
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            raise SlurmError(f"{command[0]} is not installed here; it is on a cluster's login nodes") from None
        except subprocess.TimeoutExpired as error:
            problem = f"{name} timed out after {error.timeout:.0f} s: is Slurm's controller down?"
            continue
        if done.returncode == 0:
            _given_up.clear()
            if command[0] == "sbatch":  # what the site says to its users
                with contextlib.suppress(OSError):  # the job is queued, whether or not they can read it
                    print(printable(done.stderr), end="", file=sys.stderr, flush=True)
            return done.stdout
        prefix = f"{command[0]}: "
        words = [line.removeprefix(prefix).removeprefix("error: ") for line in done.stderr.splitlines() if line]
        problem = f"{name}: {'; '.join(words) or f'exit status {done.returncode}'}"
        if not any(outage in done.stderr for outage in _OUTAGES):
            break
    # The request may have arrived, and the answer not.
    if command[0] == "sbatch" and any(lost in problem for lost in ("timed out", "Zero Bytes", "receive failure")):
        problem += "; the job may be queued all the same: look with squeue --me"
    raise SlurmError(problem)


def environment() -> dict[str, str]:
    """Return this process's environment without variables that change the behavior of Slurm's commands."""
    return {
        name: value for name, value in os.environ.items() if name in _KEPT_VARIABLES or not name.startswith(_CHANGING)
    }


# Slurm's notation of times and nodes.


def parse_duration(text: str) -> int | None:
    """Parse an sbatch --time (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) into seconds; None if invalid."""
    for form in _FORMS:
        match = re.fullmatch(form, text.strip(), re.ASCII)
        if match:
            return sum(_UNIT_SECONDS[unit] * int(count) for unit, count in match.groupdict().items() if count)
    return None


def time_option(seconds: float) -> str:
    """Format seconds for sbatch: `90061.0` as `1-01:01:01`, `3661` as `01:01:01`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}-{clock}" if days else clock


def expand_nodes(text: str) -> list[str]:
    """Expand `"gpu[08-10,12],login1"` to a list of names, like `scontrol show hostnames`, which a container lacks.
    Raises `UserError` if `text` is not a list of nodes."""
    names: list[str] = []
    for item in re.split(r",(?![^\[]*\])", text):  # at commas outside brackets
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


# Queries and requests of a job about itself.


class Scheduler:
    """Slurm's commands for one job (its id as `scontrol` takes it). All raise `SlurmError` if Slurm refuses, or does
    not answer after several tries."""

    def __init__(self, job: str) -> None:
        self.job = job

    def ended_by_slurm(self) -> str | None:
        """Return the job's state if Slurm has ended it (cancelled, requeued or out of time) while this process still
        runs; None if the job continues."""
        state = self._job().get("JobState")
        return state if state in (*_ENDED, *_LEAVING) else None

    def is_requeued_by_slurm(self) -> bool:
        """Check whether Slurm is preempting the job and will requeue it by itself once its processes have ended. A
        second requeue request would start the job again after it has finished."""
        job = self._job()
        if job.get("PreemptTime", "None") == "None" or job.get("Requeue") != "1":
            return False
        return "REQUEUE" in self._preempt_mode(job).upper().split(",")

    def _preempt_mode(self, job: dict[str, str]) -> str:
        """Return what Slurm does with the job when it preempts it. With preempt/qos the partition has no say in it."""
        config = dict(re.findall(r"^(\w+) *= (\S+)", _ask("scontrol", "show", "config", tries=_TRIES), re.MULTILINE))
        if config.get("PreemptType") != "preempt/qos":
            partition = _ask("scontrol", "show", "partition", job.get("Partition", ""), tries=_TRIES)
            return _fields(partition).get("PreemptMode", "")
        query = ("sacctmgr", "--noheader", "--parsable2", "show", "qos", job.get("QOS", ""), "format=PreemptMode")
        mode = _ask(*query, tries=_DATABASE_TRIES).strip()
        return config.get("PreemptMode", "") if mode == "cluster" else mode

    def requeue(self, without: Sequence[str] = ()) -> None:
        """Requeue the job, on nodes other than `without`. Slurm then ends this job's processes. Raises `SlurmError`
        also if the job is requeued but Slurm refuses its new settings; it is then cancelled."""
        job = self._job()
        changes = []
        if job.get("Requeue") == "0":  # --no-requeue would also refuse this request: lift it temporarily
            _ask("scontrol", "update", f"JobId={self.job}", "Requeue=1", tries=_TRIES)
            changes.append("Requeue=0")
        if without:
            excluded = job.get("ExcNodeList", "(null)")
            before = [] if excluded == "(null)" else expand_nodes(excluded)
            changes.append(f"ExcNodeList={','.join(dict.fromkeys([*before, *without]))}")
        _ask("scontrol", "requeue", self.job, tries=_TRIES)
        if changes:
            # Only a pending job accepts this. The job is pending now, and cannot start before this process has ended.
            try:
                _ask("scontrol", "update", f"JobId={self.job}", *changes, tries=_TRIES)
            except SlurmError:
                self.cancel([self.job])  # else it would start again, on the same nodes
                raise

    def pending_after(self, script: Path) -> list[str]:
        """Return the ids of this user's other pending jobs that run the same script."""
        text = _ask("squeue", "--me", "--noheader", "--states=PENDING", "--format=%i|%o", tries=_TRIES)
        jobs = dict(line.strip().split("|", 1) for line in text.splitlines() if "|" in line)
        # sbatch resolves the current folder's links for a relative path, which arguments may follow.
        folders = {job: f"{path} ".partition(f"/{script.name} ")[0] for job, path in jobs.items()}
        own = os.path.realpath(script.parent)
        return [job for job, folder in folders.items() if job != self.job and os.path.realpath(folder) == own]

    def cancel(self, jobs: Sequence[str]) -> None:
        if jobs:
            _ask("scancel", *jobs, tries=_TRIES)

    def _job(self) -> dict[str, str]:
        return _fields(_ask("scontrol", "show", "job", self.job, tries=_TRIES))


def job_at_work(jobs: Sequence[str]) -> str | None:
    """Return the first of these jobs that is running; None if none is, or if Slurm cannot be asked, as in a
    container. Waits some minutes for one that is about to end, whose processes may still save."""
    for job in jobs:
        try:
            scheduler, patience = Scheduler(job), time.monotonic() + _LEAVING_SECONDS
            while (state := scheduler.ended_by_slurm()) == "COMPLETING" and time.monotonic() < patience:
                time.sleep(_PAUSE_SECONDS)
            if state is None:
                return job
        except SlurmError:  # Slurm has forgotten it, or there is no scontrol
            continue
    return None


def _fields(text: str) -> dict[str, str]:
    """Parse scontrol's `Name=value` fields; a value with spaces is cut to its first word."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", text))
