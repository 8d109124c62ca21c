"""The end of a job: `in_job.py finalize RUN --status N`, run by the batch script after the launchers have exited."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import AttemptFailed, describe_os_error
from plt_megatron.launcher import decisions
from plt_megatron.launcher.decisions import last_error
from plt_megatron.launcher.job import JobSettings, load_settings, read_allocation
from plt_megatron.launcher.records import Outcome, Records, describe_end, last_lines, own_output
from plt_megatron.run_folder import attempts
from plt_megatron.run_folder.attempts import ExitStatus
from plt_megatron.run_folder.files import write_text
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm.client import Scheduler, SlurmError, expand_nodes

# Set by job.sbatch to the line at which its setup stopped; empty: unknown.
SETUP_FAILED = "PLT_SETUP_FAILED"
# Set by job.sbatch to the size of the job's output at its start: what is before is of a start before a requeue.
OUTPUT_BEGINS = "PLT_OUTPUT_BEGINS"
_NOT_STARTED = (ExitStatus.USER_ERROR, 126, 127)  # 126, 127: the shell's statuses for a command that it cannot start
_TRIES, _PAUSE_SECONDS = 20, 15.0
_LINES = 20  # lines of the job's output in why.txt
_SRUN_LINES = 2000  # lines of it in which srun may say which launchers ended
_EXITED = re.compile(r"srun: error: (\S+): tasks? \S+: Exited with exit code (\d+)")
_ECHO = re.compile(r"srun: (error: .*: tasks? .*: Exited with|Terminating )|slurmstepd: .*CANCELLED")


def finalize_job(run: Path, status: int) -> int:
    """Finish, requeue, let the chain continue, or give up with the reason in why.txt, given the exit status of the srun
    that ran the launchers. Return the job's exit status: 0 if the run is finished, 75 if a user stopped it, else that
    of srun, or 1 if that is 0 and the run is given up."""
    if status == ExitStatus.RUN_BUSY:  # the run belongs to another job
        return status
    allocation, settings = read_allocation(), patiently(lambda: load_settings(run))
    # Slurm also signals this process when it requeues the job: ignore that, to finish what has been started.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    run_records = Records(run, allocation)
    end = patiently(lambda: run_records.of_this_start() or _missing_end(run_records, status))
    decision = decisions.decide(patiently(run_records.events), settings)
    scheduler = Scheduler(allocation.scheduler_id)
    return JobFinalizer(settings, run_records, scheduler, decision, end, status).act()


def patiently[T](read: Callable[[], T]) -> T:
    """Return what `read` returns, though a disk does not answer for some minutes. Raises its last error."""
    for _ in range(_TRIES):
        try:
            return read()
        except (OSError, AttemptFailed) as error:
            said = describe_os_error(error) if isinstance(error, OSError) else error
            print(f"error: {said}; trying again", file=sys.stderr, flush=True)
            time.sleep(_PAUSE_SECONDS)
    return read()


def _missing_end(run_records: Records, status: int) -> dict[str, Any]:
    """Record the end that the launchers could not record, and return it."""
    own = [start for start in attempts.unended(run_records.events()) if run_records.is_own(start)]
    attempt = own[-1]["attempt"] if own else run_records.begin()
    return run_records.end(attempt, _outcome_without_record(run_records.folder, status))


def _nodes_that_left(output: Path | None, start: int) -> dict[str, str] | None:
    """Return the nodes whose launchers ended before the others, which srun then killed; none if all did. None: the
    others left because the first node's launcher was killed."""
    ended: dict[str, int] = {}
    for line in last_lines(output, _SRUN_LINES, start) if output else ():
        if found := _EXITED.match(line):
            ended |= dict.fromkeys(expand_nodes(found[1]), int(found[2]))
    own = {node: status for node, status in ended.items() if status != ExitStatus.NODE_LOST}
    if ended and not own:
        return None
    if len(own) >= len(read_allocation().nodes):
        return {}
    return {node: f"its launcher ended with status {status}" for node, status in own.items()}


def _outcome_without_record(folder: RunFolder, status: int) -> Outcome:
    """Infer how the launchers ended, or why they did not start, from what the batch script alone knows."""
    first_is_gone = Outcome(attempts.NODE_FAILED, "the first node's launcher is gone")
    if status == ExitStatus.NODE_LOST:
        return first_is_gone
    if status == ExitStatus.PREEMPTED:
        return Outcome(attempts.PREEMPTED, "asked to stop before training began")
    stopped_at, output, start = os.environ.get(SETUP_FAILED), own_output(), int(os.environ.get(OUTPUT_BEGINS) or 0)
    lines = last_lines(output, _LINES, start) if output else []
    said = last_error(lines) or next((line for line in reversed(lines) if not _ECHO.match(line)), "")
    ends = f": {said}; see {output}" if said else ""
    if stopped_at is not None:
        reason = f"the job's setup failed{f' at `{stopped_at}`' if stopped_at else ''}{ends}"
        advice = f"fix the cluster's profile and submit the run again, or fix {folder.job_script}"
        return Outcome(attempts.FAILED, f"{reason}; {advice}", retry=False, output=lines)
    if status in _NOT_STARTED:
        return Outcome(attempts.FAILED, f"the launchers did not start{ends}", retry=False, output=lines)
    left = _nodes_that_left(output, start)
    if left is None:
        return first_is_gone
    named = "; ".join(f"{node}: {why}" for node, why in left.items())
    reason = f"{named or f'the launchers ended with status {status}'}, without a record{ends}"
    return Outcome(attempts.NODE_FAILED if left else attempts.FAILED, reason, bad_nodes=left, output=lines)


@dataclass(frozen=True)
class JobFinalizer:
    """Carries out a decision about the last attempt, whose `end` is from attempts.jsonl."""

    settings: JobSettings
    records: Records
    scheduler: Scheduler
    decision: decisions.Decision
    end: dict[str, Any]
    status: int

    def act(self) -> int:
        """Carry out the decision and return the job's exit status."""
        match self.decision.action:
            case decisions.FINISH:
                self._cancel_chain()
                print("the run is finished", flush=True)
                return 0
            case decisions.HALT:
                self._cancel_chain()
                self._say(f"; continue with: {self.records.folder.resubmit}")
                return ExitStatus.PREEMPTED
            case decisions.STOP:
                return self._give_up()
        return self._go_on()

    def _go_on(self) -> int:
        """Have the run continued: by Slurm itself, by the chain, by requeueing, or by the user."""
        settings, excluding = self.settings, self.decision.action == decisions.EXCLUDE
        ended = _ask(self.scheduler.ended_by_slurm, None)
        if ended is not None:  # already requeued, or cancelled by a user
            self._say(f"; the job is {ended}. If it is not requeued: {self.records.folder.resubmit}")
        elif settings.chain > 1 and not excluding and (jobs := self._chain()):
            self._say("; the chain's next job continues")
        elif settings.requeue or excluding:
            return self._requeue()
        elif settings.chain > 1 and jobs is None:
            self._say("; the chain's next job continues, if there is one: Slurm does not answer")
        elif self.end["status"] == attempts.PREEMPTED:
            self._say(f". Continue with: {self.records.folder.resubmit}")
        else:
            return self._give_up("; not continued: no --requeue and no further job in a chain")
        return self.status

    def _requeue(self) -> int:
        if _ask(self.scheduler.is_requeued_by_slurm, False):
            self._say("; preempted by another job, Slurm requeues it")
            return self.status
        without = f", without {', '.join(self.decision.nodes)}" if self.decision.nodes else ""
        self._say(f"; requeued{without}")
        try:
            self.scheduler.requeue(list(self.decision.nodes))
        except SlurmError as error:
            if self.settings.chain > 1 and self._chain() != []:
                print(f"{error}; the chain's next job continues", flush=True)
                return self.status
            return self._give_up(f"; could not be requeued{without}: {error}")
        return self.status

    def _give_up(self, why: str = "") -> int:
        reason, path = self.decision.reason + why, self.records.folder.why_file
        self.records.stop(self.end["attempt"], reason)
        text = describe_end(self.records.folder, reason, self.end)
        try:
            write_text(path, text)
        except OSError as error:
            print(f"error: {path} cannot be written ({error.strerror}); it would say:\n{text}", file=sys.stderr)
            print(f"given up: {reason}", flush=True)
        else:
            print(f"given up: {reason}; see {path}", flush=True)
        self._cancel_chain()
        return self.status or 1

    def _chain(self) -> list[str] | None:
        """Return the ids of the jobs that wait for this one; None if Slurm does not say."""
        return _ask(lambda: self.scheduler.pending_after(self.records.folder.job_script.absolute()), None)

    def _cancel_chain(self) -> None:
        if self.settings.chain > 1 and (jobs := self._chain()):
            _ask(lambda: self.scheduler.cancel(jobs), None)
            print(f"cancelled the rest of the chain: {', '.join(jobs)}", flush=True)

    def _say(self, what: str) -> None:
        print(self.decision.reason + what, flush=True)


def _ask[T](question: Callable[[], T], otherwise: T) -> T:
    try:
        return question()
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return otherwise
