"""attempts.jsonl: a line at the start and at the end of each attempt of a Slurm job at a run, that is of each start of
the run's processes, one where the run was given up ("stop"), and one where it is tried again all the same ("again").
Appended to, never rewritten. And the exit statuses of processes."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from plt_megatron.errors import EXIT_USER_ERROR
from plt_megatron.run_folder import json_lines

# How an attempt ends. Killed: it left no exit record.
FINISHED, PREEMPTED, FAILED, NODE_FAILED, KILLED = "finished", "preempted", "failed", "node_failed", "killed"


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of an attempts.jsonl; those that a crash or a full disk has torn are left out."""
    events = json_lines.read(path, skip_broken=True)
    return [event for event in events if event.get("event") in ("start", "end", "stop", "again")]


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


def setup_warnings(events: Iterable[dict[str, Any]]) -> list[str]:
    """What went wrong in the setup of the last attempt's job without ending it."""
    starts = [event for event in events if event["event"] == "start"]
    return list(starts[-1].get("warnings") or []) if starts else []


def job_seconds(events: Iterable[dict[str, Any]]) -> float:
    """Seconds between the starts and the ends of attempts, together."""
    starts: dict[Any, float] = {}
    seconds = 0.0
    for event in events:
        if event["event"] == "start":
            starts[event.get("attempt")] = event.get("time", math.nan)
        elif event["event"] == "end":
            begun = starts.pop(event.get("attempt"), math.nan)
            elapsed = event.get("time", math.nan) - begun
            seconds += elapsed if elapsed > 0 else 0.0  # not of a clock that was set back, nor without a start
    return seconds


class ExitStatus(IntEnum):
    """Statuses of trainers, launchers and jobs. Job scripts and users' wrappers depend on these numbers."""

    FINISHED = 0
    FAILED = 1
    USER_ERROR = EXIT_USER_ERROR  # something for the user to fix
    PREEMPTED = 75  # asked to stop, and saved: the same command continues (sysexits' EX_TEMPFAIL)
    # Of a Slurm job's launchers:
    BAD_NODE = 76  # a node failed the checks
    NODE_LOST = 77
    RUN_BUSY = 78  # another job has the run


# Statuses of a process that do not make the run's other processes stop.
PEACEFUL = (ExitStatus.FINISHED, ExitStatus.PREEMPTED)


def describe_exit(returncode: int) -> str:
    """How a process ended, in words: `exited with status 1`, `was killed by SIGKILL (out of memory?)`.

    Args:
        returncode: as subprocess has it: below zero for a signal.
    """
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}" + (" (out of memory?)" if -returncode == signal.SIGKILL else "")
