"""What a job asks of Slurm about itself: its state, a requeue, the cancellation of later jobs."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plt_megatron.launcher.job import expand_nodes

_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PENDING", "PREEMPTED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
)
_TRIES, _PAUSE_SECONDS, _TIMEOUT_SECONDS = 4, 5.0, 60.0


class SchedulerError(RuntimeError):
    """Slurm refused, or did not answer after several tries."""


class Scheduler:
    """Slurm's commands, for one job.

    Args:
        job: its id as `scontrol` takes it.
        run: runs a command and returns its output; for tests.
    """

    def __init__(self, job: str, run: Callable[[Sequence[str]], str] | None = None) -> None:
        self.job = job
        self._run = run or _run

    def ended_by_slurm(self) -> str | None:
        """The job's state if Slurm has ended it (cancelled, requeued or out of time) while this process still
        runs; None if it continues.

        Raises:
            SchedulerError: Slurm does not say.
        """
        state = self._job().get("JobState")
        return state if state in _ENDED else None

    def is_requeued_by_slurm(self) -> bool:
        """Whether Slurm preempts the job and queues it again by itself as soon as its processes have ended. Asked to do
        so a second time, it would start the job once more after it has finished.

        Raises:
            SchedulerError: Slurm does not say.
        """
        job = self._job()
        if job.get("PreemptTime", "None") == "None" or job.get("Requeue") != "1":
            return False
        partition = _fields(self._run(["scontrol", "show", "partition", job.get("Partition", "")]))
        return "REQUEUE" in partition.get("PreemptMode", "").split(",")

    def requeue(self, without: Sequence[str] = ()) -> None:
        """Have the job start again, on other nodes than `without`. Slurm then ends this job's processes.

        Raises:
            SchedulerError: it was refused, or the job is queued again and `without` was refused.
        """
        job = self._job()
        changes = []
        if job.get("Requeue") == "0":  # submitted with --no-requeue, which refuses this too: lifted for once
            self._run(["scontrol", "update", f"JobId={self.job}", "Requeue=1"])
            changes.append("Requeue=0")
        if without:
            excluded = job.get("ExcNodeList", "(null)")
            before = [] if excluded == "(null)" else expand_nodes(excluded)
            changes.append(f"ExcNodeList={','.join(dict.fromkeys([*before, *without]))}")
        self._run(["scontrol", "requeue", self.job])
        if changes:
            # Only a pending job takes it. This one is, and cannot start before the process that runs this has ended.
            self._run(["scontrol", "update", f"JobId={self.job}", *changes])

    def pending_after(self, script: Path) -> list[str]:
        """The ids of this user's other jobs that wait to run the same script."""
        command = ["squeue", "--me", "--noheader", "--states=PENDING", "--format=%i|%o"]
        found = []
        for line in self._run(command).splitlines():
            job, _, path = line.strip().partition("|")
            # With arguments, if somebody gave it some.
            if job and job != self.job and (path + " ").startswith(f"{script} "):
                found.append(job)
        return found

    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs.

        Raises:
            SchedulerError: it was refused.
        """
        if jobs:
            self._run(["scancel", *jobs])

    def _job(self) -> dict[str, str]:
        return _fields(self._run(["scontrol", "show", "job", self.job]))


def job_at_work(jobs: Sequence[str]) -> str | None:
    """The first of these jobs that runs. None too if Slurm cannot be asked, as in a container."""
    for job in jobs:
        try:
            if Scheduler(job).ended_by_slurm() is None:
                return job
        except SchedulerError:  # Slurm has forgotten it, or there is no scontrol
            continue
    return None


def _fields(text: str) -> dict[str, str]:
    """scontrol's `Name=value` by name; of values with spaces the first word."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", text))


def _run(command: Sequence[str]) -> str:
    """A command's output; tried again if the controller does not answer."""
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except FileNotFoundError as error:
            raise SchedulerError(f"cannot run {command[0]}: {error.strerror}") from error
        except subprocess.TimeoutExpired:
            problem = f"no answer in {_TIMEOUT_SECONDS:.0f} s"
            continue
        if done.returncode == 0:
            return done.stdout
        problem = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if "Unable to contact" not in done.stderr and "timed out" not in done.stderr:
            break
    raise SchedulerError(f"{' '.join(command[:2])}: {problem}")
