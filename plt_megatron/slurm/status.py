"""plt status: the status of runs, from Slurm and from their folders."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import CONFIG, RunFolder, runs_named
from plt_megatron.run_folder.status import RunStatus, read_run_status
from plt_megatron.run_folder.text import format_duration, format_table, plural
from plt_megatron.slurm import client
from plt_megatron.slurm.run_files import jobs_of, log_of


@dataclass(frozen=True)
class JobStatus:
    """Status of one run.

    Attributes:
        state: running, pending, finished, preempted, failed, stopped, not started, not readable, ...
        detail: details of the state: the job, its nodes, why it is pending.
        jobs: ids of the run's running and pending jobs.
    """

    run: Path
    state: str
    detail: str
    jobs: list[str]
    progress: RunStatus


def job_status(run: Path, jobs: Sequence[client.Job] | None) -> JobStatus:
    """Return the status of a run. `jobs`: this user's jobs; None if Slurm cannot be asked."""
    try:
        progress = read_run_status(run)
        own = [] if jobs is None else jobs_of(run, jobs)
    except OSError as error:
        return JobStatus(run, "not readable", _unreadable(error.filename or run, error), [], RunStatus(run))
    active = [job for job in own if job.active]
    if active:
        state, detail = _active(active)
    else:
        state, detail = _at_rest(run, progress, own)
        if jobs is None and state not in ("finished", "failed"):
            detail = f"{detail}; Slurm was not asked" if detail else "Slurm was not asked"
    return JobStatus(run, state, detail, [job.id for job in active], progress)


def _active(jobs: Sequence[client.Job]) -> tuple[str, str]:
    """Return state and detail of a chain's running job, else of its first pending one."""
    ordered = sorted(jobs, key=lambda job: (job.state == "PENDING", _number(job.id)))
    first, behind = ordered[0], len(ordered) - 1
    more = f", {behind} more of its chain queued behind it" if behind else ""
    if first.state == "PENDING":
        starts = f"expected to start {first.start}" if first.start not in ("N/A", "") else ""
        why = ", ".join(filter(None, (first.reason, starts)))
        return "pending", f"job {first.id}" + (f" ({why})" if why else "") + more
    return first.state.lower(), f"job {first.id} on {first.nodes}, {first.elapsed} of {first.limit}{more}"


def _number(job_id: str) -> int:
    return int(job_id.partition("_")[0])


def _at_rest(run: Path, progress: RunStatus, ended: Sequence[client.Job]) -> tuple[str, str]:
    """Return state and detail of a run without active jobs, from its folder, or from Slurm if the job could not record
    its end."""
    folder = RunFolder(run)
    if progress.finished:
        return "finished", ""
    if progress.stopped is not None or folder.why_file.is_file():
        return "failed", progress.stopped or f"see {folder.why_file}"
    last = max(ended, key=lambda job: _number(job.id), default=None)
    advice = f"no job continues it: sbatch {folder.job_script}" if folder.job_script.is_file() else ""
    # No recorded end: the job was killed before it could write one.
    if last is not None and not progress.last_status:
        return last.state.lower(), "; ".join(filter(None, (f"job {last.id} ended that way{_why(run, last)}", advice)))
    if progress.last_status:
        since = last is not None and last.id not in progress.attempt_jobs and last.state != "CANCELLED"
        later = f"job {last.id} has {last.state.lower()} since{_why(run, last)}" if last and since else ""
        return progress.last_status, "; ".join(filter(None, (later, advice)))
    if progress.attempts:
        return "interrupted", "its last attempt left no exit record"
    if progress.step:
        return "not finished", ""
    return "not started", ""


def _why(run: Path, job: client.Job) -> str:
    """Return Slurm's reason for a job's end, and the log that may say more."""
    log = log_of(run, job.id)
    return (f" ({job.reason})" if job.reason else "") + (f": see {log}" if log.is_file() else "")


# As text.


def describe(statuses: Sequence[JobStatus]) -> str:
    """Format a table, with notes on single runs below it."""
    rows: list[tuple[str, ...]] = [("RUN", "STATE", "STEP", "TOKENS/S", "LEFT", "RESTARTS", "CHECKPOINT")]
    rows += [_row(each) for each in statuses]
    lines = [format_table(rows)]
    for each in statuses:
        notes = [each.detail] if each.detail else []
        notes += each.progress.problems
        notes += [f"warning: {warning}" for warning in each.progress.warnings]
        notes += each.progress.restarts[-3:]
        if len(each.progress.restarts) > 3:
            earlier = plural(len(each.progress.restarts) - 3, "earlier attempt")
            notes[-3:-3] = [f"... {earlier} in {RunFolder(each.run).attempts_file}"]
        if notes:
            lines += ["", f"{each.run}:", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _row(each: JobStatus) -> tuple[str, ...]:
    progress = each.progress
    rate, left = progress.tokens_per_second, progress.seconds_left
    steps = f"{progress.steps:,}" if progress.steps is not None else "?"
    return (
        str(each.run),
        each.state,
        f"{progress.step:,} of {steps}",
        f"{rate:,.0f}" if rate else "-",
        format_duration(left) if left is not None and each.state != "finished" else "-",
        str(max(0, progress.attempts - 1)),
        f"step {progress.checkpoint:,}" if progress.checkpoint else "none",
    )


def as_json(statuses: Sequence[JobStatus]) -> str:
    """Format one JSON object per line."""
    lines = []
    for each in statuses:
        values = {name: value for name, value in dataclasses.asdict(each.progress).items() if name != "run"}
        values |= {"run": str(each.run), "state": each.state, "detail": each.detail, "jobs": each.jobs}
        lines.append(json.dumps(values | {"seconds_left": each.progress.seconds_left}))
    return "\n".join(lines)


def report(names: Sequence[str], output_dir: str, json_lines: bool) -> str:
    """Return the output of plt status, with notes on unreadable folders, and on Slurm if it could not be asked.

    Raises:
        UserError: a run does not exist.
    """
    notes: list[str] = []
    runs = runs_named(names, output_dir, lambda error: notes.append(f"note: {_unreadable(error.filename, error)}"))
    if not runs:
        raise UserError("\n".join([f"no run below {output_dir}: no folder has a {CONFIG}", *notes]))
    jobs = None
    try:
        jobs = client.my_jobs()
    except client.SlurmError as error:
        notes.append(f"note: status from the run folders alone, Slurm could not be asked: {error}")
    statuses = [job_status(run, jobs) for run in runs]
    if not json_lines:
        return "\n".join([*notes, describe(statuses)])
    for note in notes:
        print(note, file=sys.stderr)
    return as_json(statuses)


def _unreadable(path: Path | str, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror})"
