"""Files that a job writes into the run's folder: attempts.jsonl (`run_folder.attempts`), why.txt, and the ranks' logs.

Restarts append to the logs; every line has its time, attempt and rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError, describe_os_error
from plt_megatron.launcher.job import Allocation
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.attempts import KILLED, describe_exit, last_attempt, setup_warnings, unended
from plt_megatron.run_folder.checkpoints import latest_of_full_size, latest_step
from plt_megatron.run_folder.folder import RunFolder

# Set by job.sbatch: failures that its setup skipped, one per line.
SETUP_WARNINGS = "PLT_SETUP_WARNINGS"
_LINE_BYTES = 1 << 9  # for each of the last lines that are looked for at the end of a job's output, at least
_TAIL_BYTES = 1 << 14  # for all of them, at least
_SHELL = re.compile(r"^\S*: line \d+: ")  # bash's prefix of an error: its position in the script


@dataclass(frozen=True)
class Exit:
    """A process's end: its exit status (negative: a signal) and its last lines."""

    rank: int
    node: str
    code: int
    lines: list[str]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    status: str  # one of `run_folder.attempts`
    reason: str  # one line
    retry: bool = True  # whether another attempt may succeed; not after a user error
    bad_nodes: dict[str, str] = field(default_factory=dict)  # node -> its fault; the job should continue without these
    failure: Exit | None = None  # the rank that caused it to fail, if one did
    output: list[str] = field(default_factory=list)  # the last lines of the job's, if no rank reports anything


class Records:
    """One job's access to the records of its run."""

    def __init__(self, run: Path, allocation: Allocation) -> None:
        self.folder = RunFolder(run)
        self._job = {
            "job_id": allocation.scheduler_id,
            "restart_count": allocation.restart_count,
            "nodes": list(allocation.nodes),
        }
        self._unwritten: list[dict[str, Any]] = []

    def events(self) -> list[dict[str, Any]]:
        """Return the run's events, with those of this process that a full or lost disk did not take."""
        return [*self.folder.attempts(), *self._unwritten]

    def begin(self) -> int:
        """Record the start of an attempt and return its number. Earlier attempts without an end get one now."""
        events = self.events()
        for event in unended(events):
            reason = "no exit record: its node was lost, or Slurm ended it (scancel, a limit) before it could write one"
            self._end(event | {"time": self._last_seen(event)}, Outcome(KILLED, reason))
        attempt = last_attempt(events) + 1
        self.folder.put_why_aside(attempt)  # the run was given up, and someone has restarted it
        start = {"event": "start", "attempt": attempt, **self._job, "step": self.folder.last_step()}
        warnings = os.environ.get(SETUP_WARNINGS, "").splitlines()
        self._append(start | ({"warnings": warnings} if warnings else {}))
        return attempt

    def end(self, attempt: int, outcome: Outcome) -> dict[str, Any]:
        """Record the end of an attempt of this job, and return the event."""
        return self._end({"attempt": attempt, "time": time.time(), **self._job}, outcome)

    def stop(self, attempt: int, reason: str) -> None:
        """Record that the run has been given up."""
        self._append({"event": "stop", "attempt": attempt, **self._job, "reason": reason})

    def of_this_start(self) -> dict[str, Any] | None:
        """Return the end of this job's last attempt since Slurm started it; None if there is none."""
        for event in reversed(self.events()):
            if event["event"] != "stop" and event.get("job_id") == self._job["job_id"]:
                return event if self.is_own(event) and event["event"] == "end" else None
        return None

    def is_own(self, event: dict[str, Any]) -> bool:
        """Whether an event is of this job since Slurm started it."""
        return all(event.get(name) == self._job[name] for name in ("job_id", "restart_count"))

    def _last_seen(self, start: dict[str, Any]) -> float:
        """Return when an attempt without an end last logged a step: what follows may be time in the queue."""
        begun = float(start.get("time", 0.0))  # a damaged line has none
        with contextlib.suppress(OSError):
            return max(begun, self.folder.metrics_file.stat().st_mtime)
        return begun

    def _end(self, start: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
        cause = outcome.failure
        failure = None
        if cause is not None:
            exit_text = describe_exit(cause.code)
            failure = {"rank": cause.rank, "node": cause.node, "exit": exit_text, "lines": cause.lines}
        return self._append(
            {name: start.get(name) for name in ("time", "attempt", "job_id", "restart_count", "nodes")}
            | {
                "event": "end",
                "status": outcome.status,
                "step": self.folder.last_step(),
                "checkpoint": self._checkpoint(),
                "reason": outcome.reason,
                "retry": outcome.retry,
                "bad_nodes": outcome.bad_nodes,
                "failure": failure,
            }
            | ({"output": outcome.output} if outcome.output else {})
        )

    def _checkpoint(self) -> int | None:
        """Return the step of the last checkpoint; None if a disk does not answer."""
        try:
            return latest_step(self.folder.path)
        except (OSError, UserError) as error:
            said = describe_os_error(error) if isinstance(error, OSError) else error
            print(f"error: {said}", file=sys.stderr, flush=True)
            return None

    def _append(self, event: dict[str, Any]) -> dict[str, Any]:
        event = {"event": event["event"], "time": time.time()} | event
        path = self.folder.attempts_file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            json_lines.append(path, event, sync=True)
        except OSError as error:  # a full disk: the run can continue without the record
            self._unwritten.append(event)
            print(f"error: {path}: {error.strerror}; not recorded: {json.dumps(event)}", file=sys.stderr)
        return event


def _last_checkpoint(folder: RunFolder) -> str:
    try:
        return str(latest_of_full_size(folder.path) or "none")
    except UserError as error:  # a file system that is away
        return f"unknown, {error}"


def describe_end(folder: RunFolder, reason: str, end: dict[str, Any]) -> str:
    """Return the text of why.txt: why the run stopped, the failed rank and its last lines, and what is saved. `end` is
    the last attempt's, from attempts.jsonl."""
    lines = [
        reason,
        f"attempt {end['attempt']}, job {end['job_id']}, on {', '.join(end['nodes'] or [])}: {end['status']}",
        f"last step in metrics.jsonl: {end['step']}",
        f"last complete checkpoint: {_last_checkpoint(folder)}",
        *(f"warning: {warning}" for warning in setup_warnings(folder.attempts())),
    ]
    failure = end.get("failure")
    if failure:
        lines += ["", f"rank {failure['rank']} on {failure['node']} {failure['exit']}; its last lines:", ""]
        lines += [f"    {line}" for line in failure["lines"]]
    if end.get("output"):
        lines += ["", "Last lines of the job's output:", "", *(f"    {line}" for line in end["output"])]
    lines += ["", f"The logs of all ranks are in {folder.logs}, all attempts in {folder.attempts_file}."]
    return "\n".join(lines) + "\n"


# Logs.


def own_output() -> Path | None:
    """Return the file behind this process's stderr: for a batch script and its children the job's output file, unless
    sbatch was told otherwise. None if it is not a file."""
    path = Path(os.path.realpath("/proc/self/fd/2"))
    return path if path.is_file() else None


def last_lines(path: Path, count: int, start: int = 0) -> list[str]:
    """Return the last non-empty lines of a text file from byte `start` on, bash's errors without their position; none
    if it cannot be read."""
    text = json_lines.tail(path, max(_TAIL_BYTES, count * _LINE_BYTES), start).decode(errors="replace")
    lines = [_SHELL.sub("", line.rstrip()) for line in text.splitlines() if line.strip()]
    return lines[-count:]


def stamp(attempt: int, who: str, text: str) -> str:
    """Format a log line with time, attempt and origin."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} attempt {attempt} {who}: {text}"


class LogFile:
    """Log file to which whole lines are appended. A full disk costs lines (`lost` counts them), never the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        self._torn = False

    def write(self, lines: Iterable[str]) -> None:
        lines = list(lines)
        if not lines:
            return
        count = len(lines)
        if self.lost:
            lines.insert(0, f"... {self.lost} lines are missing here: the disk was full or unavailable")
        data = ("\n" if self._torn else "") + "".join(f"{line}\n" for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened each time, since the file may be moved away and a disk may come back.
            with self.path.open("ab", buffering=0) as file:
                encoded = data.encode(errors="replace")
                left = encoded[file.write(encoded) :]
            self._torn, self.lost = bool(left), left.count(b"\n")
        except OSError:
            self.lost += count
