"""`plt submit --follow`: show a run's steps, its launchers' messages and its jobs' states as they arrive."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.json_lines import Follower
from plt_megatron.run_folder.status import read_run_status
from plt_megatron.run_folder.text import plural
from plt_megatron.slurm import client
from plt_megatron.slurm.run_files import log_of
from plt_megatron.slurm.submission import Submission

_LOOK_SECONDS = 1.0  # between reads of the run's files
_ASK_SECONDS = 5.0  # between queries, to spare Slurm's controller
# Prefix of a launcher's line (logs.stamp), dropped here: attempt and node are in the log.
_STAMP = re.compile(r"\S+ \S+ attempt \d+ launcher [^\s:]+: ")


def follow(submission: Submission) -> int:
    """Print progress until all jobs have ended. Ctrl-C stops the printing, not the jobs.

    Returns:
        0 if every run is finished, or after Ctrl-C; else 1.
    """
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
    sources: list[_Output | _Tail] = [_Output(log_of(run, job), labels[run]) for run, job in jobs]
    sources += [_Tail(run, label) for run, label in labels.items()]
    states = _States({job: labels[run] for run, job in jobs})
    due = time.monotonic()
    while not states.ended:
        lines = []
        if time.monotonic() >= due:
            due = time.monotonic() + ask_seconds
            lines = states.changes()
        # States first, files second, so that everything written before a job ended is shown.
        yield lines + [line for source in sources for line in source.lines()]
        if not states.ended:
            time.sleep(look_seconds)
    yield [line for run, label in labels.items() for line in _conclusion(run, label)]


def _conclusion(run: Path, label: str) -> Iterator[str]:
    progress = read_run_status(run)
    if progress.finished:
        yield f"{label}finished: step {progress.step:,} of {progress.steps:,}; {run}"
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


class _Output:
    """Reader of new lines in a job's output: its launchers' messages and srun's errors."""

    def __init__(self, path: Path, label: str) -> None:
        self._label, self._follower = label, Follower(path)

    def lines(self) -> list[str]:
        return [self._label + _STAMP.sub("", line) for line in self._follower.lines()]


class _Tail:
    """Reader of new records in metrics.jsonl, as lines of text. A resuming trainer rewinds the file to its step."""

    def __init__(self, run: Path, label: str) -> None:
        self._run, self._label = run, label
        self._follower = Follower(RunFolder(run).metrics_file, from_end=True)
        self._steps = read_run_status(run).steps

    def lines(self) -> list[str]:
        records = [json.loads(line) for line in self._follower.lines()]
        if self._follower.replaced:
            return [f"{self._label}continues after step {read_run_status(self._run).step:,}"]
        return [self._label + _step_line(record, self._steps) for record in records]


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
