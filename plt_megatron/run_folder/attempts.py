"""The attempts of Slurm jobs at a run, as recorded in attempts.jsonl, and the exit statuses of processes.

An attempt is a start of the run's processes. The file has a line for the start and one for the end of each attempt, one
where the run was given up ("stop"), and one where it is tried again all the same ("again"). It is appended to, never
rewritten.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from plt_megatron.errors import EXIT_USER_ERROR
from plt_megatron.run_folder import json_lines

# How an attempt ends. KILLED: without an exit record.
FINISHED, PREEMPTED, FAILED, NODE_FAILED, KILLED = "finished", "preempted", "failed", "node_failed", "killed"


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read the events of an attempts.jsonl, without lines that a crash, a full disk or somebody's editor has torn.

    An attempt has one end. Launchers that outlive their srun record theirs after the batch script has recorded one for
    them: theirs replaces it, in its place.
    """
    kinds = {"start": int, "end": int, "stop": int, "again": type(None)}  # of the attempt's number
    events = json_lines.read(path, skip_broken=True)
    for event in events:
        if not isinstance(event.get("time"), int | float):
            event.pop("time", None)
    known = [event for event in events if type(event.get("attempt")) is kinds.get(str(event.get("event")))]
    by_attempt = {("end", event["attempt"]) if event["event"] == "end" else id(event): event for event in known}
    return list(by_attempt.values())


def unended(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the start events of attempts that have no end event."""
    started: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "start":
            started[event["attempt"]] = event
        elif event["event"] == "end":
            started.pop(event["attempt"], None)
    return list(started.values())


def unended_jobs(events: Iterable[dict[str, Any]], but: str | None) -> list[str]:
    """Return the ids of the jobs other than `but` that have started an attempt that has no end event."""
    jobs = (str(start.get("job_id")) for start in unended(events))
    return [job for job in jobs if job != but]


def last_attempt(events: Iterable[dict[str, Any]]) -> int:
    """Return the number of the last attempt; 0 if there was none."""
    return max((event.get("attempt") or 0 for event in events), default=0)


def setup_warnings(events: Iterable[dict[str, Any]]) -> list[str]:
    """Return the failures in the setup of the last attempt's job that did not end it."""
    starts = [event for event in events if event["event"] == "start"]
    return list(starts[-1].get("warnings") or []) if starts else []


def job_seconds(events: Iterable[dict[str, Any]]) -> float:
    """Return the total seconds between the starts and the ends of attempts."""
    starts: dict[Any, float] = {}
    seconds = 0.0
    for event in events:
        if event["event"] == "start":
            starts[event.get("attempt")] = event.get("time", math.nan)
        elif event["event"] == "end":
            begun = starts.pop(event.get("attempt"), math.nan)
            elapsed = event.get("time", math.nan) - begun
            seconds += elapsed if elapsed > 0 else 0.0  # skips ends without a start, and clocks set back
    return seconds


class ExitStatus(IntEnum):
    """Exit statuses of trainers, launchers and jobs. Job scripts and users' wrappers depend on these numbers."""

    FINISHED = 0
    FAILED = 1
    USER_ERROR = EXIT_USER_ERROR  # something for the user to fix
    PREEMPTED = 75  # asked to stop, and saved: the same command continues (sysexits' EX_TEMPFAIL)
    # Only from the launchers of a Slurm job:
    BAD_NODE = 76  # a node failed the checks
    NODE_LOST = 77
    RUN_BUSY = 78  # another job has the run


# Exit statuses of a process after which the run's other processes are not stopped.
PEACEFUL = (ExitStatus.FINISHED, ExitStatus.PREEMPTED)


def describe_exit(returncode: int) -> str:
    """Describe how a process ended: `exited with status 1`, `was killed by SIGKILL (out of memory?)`. `returncode` is
    subprocess's: negative for a signal."""
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}" + (" (out of memory?)" if -returncode == signal.SIGKILL else "")
