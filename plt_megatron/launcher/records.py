"""The records of a run's attempts in its folder: attempts.jsonl, why.txt, and its progress.

attempts.jsonl has a line for the start and the end of each attempt, that is of each start of the run's processes, and
one where the run was given up ("stop"). It is only appended to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plt_megatron.launcher.allocation import Allocation
from plt_megatron.run_folder import checkpoints

FILE_NAME = "attempts.jsonl"
WHY = "why.txt"
_TAIL_BYTES = 1 << 16

FINISHED, PREEMPTED, FAILED, NODE_FAILED, KILLED = "finished", "preempted", "failed", "node_failed", "killed"


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
        status: finished, preempted, failed, node_failed, or killed (no record of its end; found at the next start).
        reason: one line.
        retry: whether another attempt may succeed; not after a user error.
        bad_nodes: node -> what is wrong with it; the job should continue without them.
        failure: of a rank, if one failed.
    """

    status: str
    reason: str
    retry: bool = True
    bad_nodes: dict[str, str] = field(default_factory=dict)
    failure: Failure | None = None


class Records:
    """The records of one run, as one job sees them.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path, allocation: Allocation) -> None:
        self.run = run
        self._allocation = allocation

    def begin(self) -> int:
        """Record the start of an attempt; returns its number. An earlier one without an end gets one now."""
        events = read_events(self.run)
        for event in unended(events):
            reason = "no exit record: its node was lost, or Slurm ended it (scancel, a limit) before it could write one"
            self._end(event, Outcome(KILLED, reason))
        if (self.run / WHY).exists():  # somebody runs it again all the same
            (self.run / WHY).replace(self.run / "logs" / f"why-before-attempt-{last_attempt(events) + 1}.txt")
        attempt = last_attempt(events) + 1
        self._append({"event": "start", "attempt": attempt, **self._job(), "step": last_step(self.run)})
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
        for event in reversed(read_events(self.run)):
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
                "step": last_step(self.run),
                "checkpoint": last_checkpoint_step(self.run),
                "reason": outcome.reason,
                "retry": outcome.retry,
                "bad_nodes": outcome.bad_nodes,
                "failure": vars(failure) if failure is not None else None,
            }
        )

    def _append(self, event: dict[str, Any]) -> None:
        line = json.dumps({"event": event["event"], "time": time.time()} | event) + "\n"
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            with (self.run / FILE_NAME).open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a full disk: the run can continue without
            print(f"error: {self.run / FILE_NAME}: {error.strerror}; not recorded: {line.strip()}", file=sys.stderr)


def read_events(run: Path) -> list[dict[str, Any]]:
    """The lines of attempts.jsonl; those that a crash or a full disk has torn are left out."""
    try:
        text = (run / FILE_NAME).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") in ("start", "end", "stop"):
            events.append(event)
    return events


def unended(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The starts of attempts that have no end."""
    started: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "start":
            started[event["attempt"]] = event
        elif event["event"] == "end":
            started.pop(event["attempt"], None)
    return list(started.values())


def last_attempt(events: Iterable[dict[str, Any]]) -> int:
    """The number of the last attempt; 0 if there was none."""
    return max((int(event.get("attempt") or 0) for event in events), default=0)


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is a torn line, or nothing
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # torn by a crash, or cut where the tail begins
            continue
    return 0


def last_checkpoint_step(run: Path) -> int:
    """The step of the checkpoint that the run would go on from, by its name; 0 if there is none."""
    path = checkpoints.latest_checkpoint(run, verify=False)
    return checkpoints.step_of(path) if path is not None else 0


def last_whole_checkpoint(run: Path) -> Path | None:
    """The last checkpoint whose files are all there in full length. Checksums would take too long here."""
    return checkpoints.latest_of_full_size(run)


def write_why(run: Path, reason: str, end: dict[str, Any] | None) -> None:
    """Write why.txt: why the run stopped, the failed rank and its last lines, and what is saved.

    Args:
        end: the end of the last attempt, from attempts.jsonl.
    """
    lines = [reason]
    if end is not None:
        lines += [
            f"attempt {end['attempt']}, job {end['job_id']}, on {', '.join(end['nodes'] or [])}: {end['status']}",
            f"last step in metrics.jsonl: {end['step']}",
        ]
    path = last_whole_checkpoint(run)
    lines.append(f"last complete checkpoint: {path or 'none'}")
    failure = (end or {}).get("failure")
    if failure:
        lines += ["", f"rank {failure['rank']} on {failure['node']} {failure['exit']}; its last lines:", ""]
        lines += [f"    {line}" for line in failure["lines"]]
    lines += ["", f"All ranks' lines are in {run / 'logs'}, all attempts in {run / FILE_NAME}."]
    (run / WHY).write_text("\n".join(lines) + "\n", encoding="utf-8")
