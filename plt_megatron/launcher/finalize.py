"""What follows when the launchers have left: `in_job.py after RUN --status N`, at the end of the batch script."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from plt_megatron.errors import EXIT_USER_ERROR
from plt_megatron.launcher import decisions, records
from plt_megatron.launcher.allocation import read_allocation
from plt_megatron.launcher.coordinator import EXIT_BUSY, EXIT_NODE_LOST
from plt_megatron.launcher.job import SCRIPT_NAME, JobSettings, load_settings
from plt_megatron.launcher.records import Outcome, Records
from plt_megatron.launcher.scheduler import Scheduler, SchedulerError
from plt_megatron.runtime.local_processes import EXIT_PREEMPTED


def after_attempt(run: Path, status: int) -> int:
    """Finish, requeue, let the chain go on, or give up with the reason in why.txt.

    Args:
        run: the run's folder.
        status: of the srun that ran the launchers.

    Returns:
        The job's exit status: 0 if the run is finished, 75 if it goes on or can go on, else a failure's.
    """
    if status == EXIT_BUSY:  # the run is another job's
        return status
    allocation, settings = read_allocation(), load_settings(run)
    # Slurm ends this process as well when it requeues the job: what has begun is brought to its end.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    run_records = Records(run, allocation)
    end = run_records.of_this_start()
    if end is None:
        end = _missing_end(run, run_records, status)
    decision = decisions.decide(records.read_events(run), settings)
    following = JobFinalizer(run, settings, run_records, Scheduler(allocation.scheduler_id))
    return following.act(decision, end, status)


def _missing_end(run: Path, run_records: Records, status: int) -> dict[str, Any]:
    """Write the end that the launchers could not write."""
    open_attempts = records.unended(records.read_events(run))
    attempt = open_attempts[-1]["attempt"] if open_attempts else run_records.begin()
    if status == EXIT_NODE_LOST:
        outcome = Outcome(records.NODE_FAILED, "the first node's launcher is gone")
    elif status == EXIT_USER_ERROR:
        outcome = Outcome(records.FAILED, "the launchers did not start: see the job's output", retry=False)
    else:
        outcome = Outcome(records.FAILED, f"the launchers ended with status {status} and no word: see the job's output")
    run_records.end(attempt, outcome)
    end = run_records.of_this_start()
    return end or {"attempt": attempt, "job_id": None, "nodes": [], "status": outcome.status, "step": 0, "reason": ""}


class JobFinalizer:
    """Carries a decision out."""

    def __init__(self, run: Path, settings: JobSettings, run_records: Records, scheduler: Scheduler) -> None:
        self._run, self._settings = run, settings
        self._records, self._scheduler = run_records, scheduler

    def act(self, decision: decisions.Decision, end: dict[str, Any], status: int) -> int:
        if decision.action == decisions.FINISH:
            self._cancel_chain()
            self._say("the run is finished")
            return 0
        if decision.action == decisions.HALT:
            self._cancel_chain()
            self._say(f"{decision.reason}; go on with: sbatch {self._run / SCRIPT_NAME}")
            return EXIT_PREEMPTED
        if decision.action == decisions.STOP:
            return self._give_up(decision.reason, end, status)
        return self._again(decision, end, status)

    def _again(self, decision: decisions.Decision, end: dict[str, Any], status: int) -> int:
        ended = self._ask(self._scheduler.ended_by_slurm, None)
        if ended is not None:  # requeued already, or cancelled by a person
            self._say(f"{decision.reason}; the job is {ended}. If it stays so: sbatch {self._run / SCRIPT_NAME}")
            return status
        if self._settings.chain > 1 and decision.action == decisions.AGAIN and self._chain():
            self._say(f"{decision.reason}; the chain's next job goes on")
            return status
        if self._settings.requeue or decision.action == decisions.EXCLUDE:
            return self._requeue(decision, end, status)
        if end["status"] == records.PREEMPTED:
            self._say(f"{decision.reason}. Go on with: sbatch {self._run / SCRIPT_NAME}")
            return status
        return self._give_up(f"{decision.reason}; neither --requeue nor a further job of a chain goes on", end, status)

    def _requeue(self, decision: decisions.Decision, end: dict[str, Any], status: int) -> int:
        if self._ask(self._scheduler.is_requeued_by_slurm, False):
            self._say(f"{decision.reason}; preempted by another job, so that Slurm queues it again")
            return status
        without = f", without {', '.join(decision.nodes)}" if decision.nodes else ""
        self._say(f"{decision.reason}; requeued{without}")
        try:
            self._scheduler.requeue(list(decision.nodes))
        except SchedulerError as error:
            return self._give_up(f"{decision.reason}; could not be requeued{without}: {error}", end, status)
        return status

    def _give_up(self, reason: str, end: dict[str, Any], status: int) -> int:
        self._records.stop(end["attempt"], reason)
        self._say(f"given up: {reason}; see {self._run / records.WHY}")
        try:
            records.write_why(self._run, reason, end)
        except OSError as error:
            print(f"error: {self._run / records.WHY}: {error.strerror}", file=sys.stderr)
        self._cancel_chain()
        return status or 1

    def _chain(self) -> list[str]:
        return self._ask(lambda: self._scheduler.pending_after(self._run.absolute() / SCRIPT_NAME), [])

    def _cancel_chain(self) -> None:
        if self._settings.chain <= 1:
            return
        jobs = self._chain()
        self._ask(lambda: self._scheduler.cancel(jobs), None)
        if jobs:
            self._say(f"cancelled the rest of the chain: {', '.join(jobs)}")

    @staticmethod
    def _ask[T](question: Any, otherwise: T) -> T:
        try:
            return question()
        except SchedulerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return otherwise

    @staticmethod
    def _say(text: str) -> None:
        print(text, flush=True)
