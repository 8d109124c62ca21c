"""plt status and `plt submit --follow`: the state of runs, from Slurm and from their folders, once or as it changes."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_megatron.errors import UserError
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.attempts import FINISHED
from plt_megatron.run_folder.folder import CONFIG, RunFolder, runs_named
from plt_megatron.run_folder.metrics import with_nan
from plt_megatron.run_folder.status import RunStatus, read_run_status
from plt_megatron.run_folder.text import format_duration, format_table, plural
from plt_megatron.slurm import client
from plt_megatron.slurm.run_files import jobs_of, log_of

if TYPE_CHECKING:
    from plt_megatron.slurm.submission import Submission  # which imports all that a submission checks


@dataclass(frozen=True)
class JobStatus:
    """Status of one run."""

    run: Path
    state: str  # running, pending, finished, preempted, failed, stopped, not started, not readable, ...
    detail: str  # the job, its nodes, why it is pending
    jobs: list[str]  # ids of the run's running and pending jobs
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
    if progress.stopped is not None:
        return "failed", progress.stopped
    last = max(ended, key=lambda job: _number(job.id), default=None)
    advice = f"no job continues it: {folder.resubmit}" if folder.job_script.is_file() else ""
    # No recorded end: the job was killed before it could write one.
    if last is not None and not progress.last_status:
        return last.state.lower(), "; ".join(filter(None, (f"job {last.id} ended that way{_why(run, last)}", advice)))
    if progress.last_status:
        since = last is not None and last.id not in progress.attempt_jobs and last.state != "CANCELLED"
        later = f"job {last.id} has {last.state.lower()} since{_why(run, last)}" if last and since else ""
        state = "not finished" if progress.last_status == FINISHED else progress.last_status  # it was made longer
        return state, "; ".join(filter(None, (later, advice)))
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
    return (
        str(each.run),
        each.state,
        _steps(progress),
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
    """Return the output of plt status, with notes on unreadable folders, and on Slurm if it could not be asked. Raises
    `UserError` if a run does not exist."""
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


_LOOK_SECONDS = 1.0  # between reads of the run's files
_ASK_SECONDS = 5.0  # between queries, to spare Slurm's controller
# Prefix of a launcher's line (logs.stamp), dropped here: attempt and node are in the log.
_STAMP = re.compile(r"\S+ \S+ attempt \d+ launcher [^\s:]+: ")


def follow(submission: Submission) -> int:
    """Print progress until all jobs have ended, and return 0 if every run is finished, else 1. Ctrl-C stops the
    printing, not the jobs, and returns 0."""
    try:
        for lines in watch(submission):
            for line in lines:
                print(line, flush=True)
    except KeyboardInterrupt:
        # An array's members by the array's id.
        jobs = dict.fromkeys(job_id.partition("_")[0] for each in submission.job_ids for job_id in each)
        print(f"\nno longer following; the job continues. To cancel it: scancel {' '.join(jobs)}", flush=True)
        return 0
    return 0 if all(read_run_status(run).finished for run in submission.runs) else 1


def watch(
    submission: Submission, *, look_seconds: float = _LOOK_SECONDS, ask_seconds: float = _ASK_SECONDS
) -> Iterator[list[str]]:
    """Yield the new lines of each poll until all jobs have ended, then the outcome of each run."""
    labels = {run: f"{run.name}: " if len(submission.runs) > 1 else "" for run in submission.runs}
    jobs = [(run, job) for run, ids in zip(submission.runs, submission.job_ids, strict=True) for job in ids]
    sources = [_new_output(log_of(run, job), labels[run]) for run, job in jobs]
    sources += [_new_records(run, label) for run, label in labels.items()]
    states = _States({job: labels[run] for run, job in jobs})
    due = time.monotonic()
    while not states.ended:
        lines = []
        if time.monotonic() >= due:
            due = time.monotonic() + ask_seconds
            lines = states.changes()
        # States first, files second, so that everything written before a job ended is shown.
        yield lines + [line for read in sources for line in read()]
        if not states.ended:
            time.sleep(look_seconds)
    yield [line for run, label in labels.items() for line in _conclusion(run, label)]


def _steps(progress: RunStatus) -> str:
    return f"{progress.step:,} of " + ("?" if progress.steps is None else f"{progress.steps:,}")


def _conclusion(run: Path, label: str) -> Iterator[str]:
    progress = read_run_status(run)
    if progress.finished:
        yield f"{label}finished: step {_steps(progress)}; {run}"
        return
    yield f"{label}not finished: step {progress.step:,}, last checkpoint at step {progress.checkpoint:,}; {run}"
    why = RunFolder(run).why_file
    if why.is_file():
        yield f"{label}{why.read_text(encoding='utf-8', errors='replace').rstrip()}"
    elif progress.restarts:
        yield f"{label}{progress.restarts[-1]}"


class _States:
    """States of the jobs in Slurm. `ended`: no job is running or pending."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels  # by job
        self._last: dict[str, str] = {}
        self._problem = ""
        self.ended = False

    def changes(self) -> list[str]:
        """Return a line per change since the last call."""
        try:
            jobs = {job.id: job for job in client.my_jobs() if job.id in self._labels}
        except client.SlurmError as error:
            # The controller may be restarting: the next call asks again.
            changed, self._problem = str(error) != self._problem, str(error)
            return [f"Slurm does not answer, trying again: {error}"] if changed else []
        self._problem = ""
        lines = []
        for job_id, label in self._labels.items():
            job = jobs.get(job_id)
            # Slurm forgets a job a few minutes after its end.
            text = _describe(job) if job else "has ended"
            if self._last.get(job_id) != text:
                self._last[job_id] = text
                lines.append(f"{label}job {job_id} {text}")
        self.ended = not any(job.active for job in jobs.values())
        return lines


def _describe(job: client.Job) -> str:
    state = job.state.lower()
    if job.state == "PENDING":
        return f"is pending ({job.reason})" if job.reason else "is pending"
    return f"is {state} on {job.nodes}" if job.state == "RUNNING" else f"is {state}"


def _new_output(path: Path, label: str) -> Callable[[], list[str]]:
    """Return a function that reads the new lines of a job's output: its launchers' messages and srun's errors."""
    follower = json_lines.Follower(path)
    return lambda: [label + _STAMP.sub("", line) for line in follower.lines()]


def _new_records(run: Path, label: str) -> Callable[[], list[str]]:
    """Return a function that reads the new records in metrics.jsonl, as lines of text. A resuming trainer rewinds the
    file to its step."""
    follower = json_lines.Follower(RunFolder(run).metrics_file, from_end=True)
    steps = read_run_status(run).steps

    def read() -> list[str]:
        records = filter(None, (json_lines.parse(line.encode()) for line in follower.lines()))
        if follower.replaced:
            return [f"{label}continues after step {read_run_status(run).step:,}"]
        return [label + _step_line(with_nan(record), steps) for record in records]

    return read


def _step_line(record: dict[str, Any], steps: int | None) -> str:
    where = f"step {record['step']:,}/{steps:,}" if steps else f"step {record['step']:,}"
    if record["kind"] == "validation":
        return f"{where}: validation, {plural(record['loop_count'], 'loop')}: loss {record['loss']:.4f}"
    if record["kind"] == "evaluation":
        return f"{where}: evaluation, " + ", ".join(f"{name} {score:.4f}" for name, score in record["scores"].items())
    if record["kind"] == "stragglers":
        slow = ", ".join(f"{name.replace('_', ' ')} {score:.0%}" for name, score in record.get("slow", {}).items())
        named = f"; slow: {slow}" if slow else ""
        return f"{where}: GPUs, the slowest at {record['slowest']:.0%} of the fastest{named}"
    if record["kind"] == "upload":
        outcome = f"failed: {record['error']}" if "error" in record else record["to"]
        return f"{where}: upload of the {record['what']} of step {record['of_step']}: {outcome}"
    if record["kind"] != "train":
        return f"{where}: {record['kind']}"
    rate = record.get("tokens_per_second")
    mfu = record.get("mfu")
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    return f"{where}: loss {record['loss']:.4f}{speed}" + (f", MFU {100 * mfu:.1f} %" if mfu else "")
