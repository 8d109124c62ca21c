"""The records of a run's attempts in its folder: attempts.jsonl (`run_folder.attempts`) and why.txt."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plt_megatron.launcher.allocation import Allocation
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.attempts import KILLED, last_attempt, setup_warnings, unended
from plt_megatron.run_folder.checkpoints import latest_of_full_size, latest_step
from plt_megatron.run_folder.folder import RunFolder

# From job.sbatch, a line each: failures that its setup passed over.
SETUP_WARNINGS = "PLT_SETUP_WARNINGS"


@dataclass(frozen=True)
class Failure:
    """The rank that caused an attempt to fail.

    Attributes:
        exit: how it ended, as text.
        lines: the last ones that it printed.
    """

    rank: int
    node: str
    exit: str
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        status: one of `run_folder.attempts`.
        reason: one line.
        retry: whether another attempt may succeed; not after a user error.
        bad_nodes: node -> what is wrong with it; the job should continue without them.
        failure: of a rank, if one failed.
        output: the last lines of the job's output, where no rank says anything.
    """

    status: str
    reason: str
    retry: bool = True
    bad_nodes: dict[str, str] = field(default_factory=dict)
    failure: Failure | None = None
    output: list[str] = field(default_factory=list)


class Records:
    """The records of one run, as one job sees them.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path, allocation: Allocation) -> None:
        self.folder = RunFolder(run)
        self._allocation = allocation

    def begin(self) -> int:
        """Record the start of an attempt; returns its number. An earlier one without an end gets one now."""
        events = self.folder.attempts()
        for event in unended(events):
            reason = "no exit record: its node was lost, or Slurm ended it (scancel, a limit) before it could write one"
            self._end(event, Outcome(KILLED, reason))
        attempt = last_attempt(events) + 1
        if self.folder.why_file.exists():  # somebody runs it again all the same
            self.folder.why_file.replace(self.folder.logs / f"why-before-attempt-{attempt}.txt")
        start = {"event": "start", "attempt": attempt, **self._job(), "step": self.folder.last_step()}
        warnings = os.environ.get(SETUP_WARNINGS, "").splitlines()
        self._append(start | ({"warnings": warnings} if warnings else {}))
        return attempt

    def end(self, attempt: int, outcome: Outcome) -> None:
        """Record the end of an attempt of this job."""
        self._end({"attempt": attempt, **self._job()}, outcome)

    def stop(self, attempt: int, reason: str) -> None:
        """Record that the run is given up."""
        self._append({"event": "stop", "attempt": attempt, **self._job(), "reason": reason})

    def of_this_start(self) -> dict[str, Any] | None:
        """The end of this job's last attempt since Slurm started it; None if there is none."""
        job = self._job()
        for event in reversed(self.folder.attempts()):
            if event["event"] != "stop" and event.get("job_id") == job["job_id"]:
                same = event.get("restart_count") == job["restart_count"]
                return event if same and event["event"] == "end" else None
        return None

    def _job(self) -> dict[str, Any]:
        allocation = self._allocation
        return {
            "job_id": allocation.scheduler_id,
            "restart_count": allocation.restart_count,
            "nodes": list(allocation.nodes),
        }

    def _end(self, start: dict[str, Any], outcome: Outcome) -> None:
        failure = outcome.failure
        self._append(
            {name: start.get(name) for name in ("attempt", "job_id", "restart_count", "nodes")}
            | {
                "event": "end",
                "status": outcome.status,
                "step": self.folder.last_step(),
                "checkpoint": latest_step(self.folder.path),
                "reason": outcome.reason,
                "retry": outcome.retry,
                "bad_nodes": outcome.bad_nodes,
                "failure": vars(failure) if failure is not None else None,
            }
            | ({"output": outcome.output} if outcome.output else {})
        )

    def _append(self, event: dict[str, Any]) -> None:
        event = {"event": event["event"], "time": time.time()} | event
        path = self.folder.attempts_file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            json_lines.append(path, event, sync=True)
        except OSError as error:  # a full disk: the run can continue without
            print(f"error: {path}: {error.strerror}; not recorded: {json.dumps(event)}", file=sys.stderr)


def describe_end(folder: RunFolder, reason: str, end: dict[str, Any]) -> str:
    """The text of why.txt: why the run stopped, the failed rank and its last lines, and what is saved.

    Args:
        end: the end of the last attempt, from attempts.jsonl.
    """
    lines = [
        reason,
        f"attempt {end['attempt']}, job {end['job_id']}, on {', '.join(end['nodes'] or [])}: {end['status']}",
        f"last step in metrics.jsonl: {end['step']}",
        f"last complete checkpoint: {latest_of_full_size(folder.path) or 'none'}",
        *(f"warning: {warning}" for warning in setup_warnings(folder.attempts())),
    ]
    failure = end.get("failure")
    if failure:
        lines += ["", f"rank {failure['rank']} on {failure['node']} {failure['exit']}; its last lines:", ""]
        lines += [f"    {line}" for line in failure["lines"]]
    if end.get("output"):
        lines += ["", "The job's output ends:", "", *(f"    {line}" for line in end["output"])]
    lines += ["", f"All ranks' lines are in {folder.logs}, all attempts in {folder.attempts_file}."]
    return "\n".join(lines) + "\n"
