"""The few things a job asks of Slurm about itself: its state, to be requeued, to cancel what comes after it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plt_megatron.slurm.in_job.allocation import expand_nodes

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
        """The job's state if Slurm has ended it (cancelled, requeued or out of time), while this process of its still
        runs; None if it goes on.

        Raises:
            SchedulerError: Slurm does not say.
        """
        state = self._field("JobState")
        return state if state in _ENDED else None

    def requeue(self, without: Sequence[str] = ()) -> None:
        """Have the job start again, on other nodes than `without`. Slurm then ends this job's processes.

        Raises:
            SchedulerError: it was refused, or the job is queued again and `without` was refused.
        """
        excluded = dict.fromkeys([*self._excluded(), *without]) if without else {}
        self._run(["scontrol", "requeue", self.job])
        if excluded:
            # Only a pending job takes it. This one is, and cannot start before the process that runs this has ended.
            self._run(["scontrol", "update", f"JobId={self.job}", f"ExcNodeList={','.join(excluded)}"])

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

    def _excluded(self) -> list[str]:
        found = self._field("ExcNodeList")
        return [] if found in (None, "(null)") else expand_nodes(found)

    def _field(self, name: str) -> str | None:
        match = re.search(rf"(?:^|\s){name}=(\S*)", self._run(["scontrol", "show", "job", self.job]))
        return match[1] if match else None


def _run(command: Sequence[str]) -> str:
    """A command's output; tried again where the controller does not answer."""
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except FileNotFoundError as error:
            raise SchedulerError(f"{command[0]} is not there: {error.strerror}") from error
        except subprocess.TimeoutExpired:
            problem = f"no answer in {_TIMEOUT_SECONDS:.0f} s"
            continue
        if done.returncode == 0:
            return done.stdout
        problem = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if "Unable to contact" not in done.stderr and "timed out" not in done.stderr:
            break
    raise SchedulerError(f"{' '.join(command[:2])}: {problem}")
