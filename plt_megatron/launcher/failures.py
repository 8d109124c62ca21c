"""Finds the cause among several failed processes, and what to report of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from plt_megatron.launcher.records import Failure, Outcome
from plt_megatron.run_folder import attempts
from plt_megatron.run_folder.exit_status import PEACEFUL, ExitStatus, describe_exit

# Errors of a rank whose peer has died: echoes of another's failure.
_ECHOES = re.compile(
    r"[Cc]onnection (closed by peer|reset by peer|refused)|Broken pipe|lost the connection to another rank"
    r"|DistBackendError|DistNetworkError|DistStoreError|remote process exited|holds the job's store, does not answer"
    r"|ncclRemoteError|ncclSystemError"
)

_SILENT = 3  # how likely a process without output is the cause


@dataclass(frozen=True)
class Exit:
    """A process's end: its status (negative: a signal) and its last lines."""

    rank: int
    node: str
    code: int
    lines: list[str]


def outcome_of(exits: list[Exit], preempted: bool) -> Outcome:
    """How an attempt ended, from the ends of its processes in order of arrival."""
    failed = [end for end in exits if end.code not in PEACEFUL]
    if failed:
        cause = min(failed, key=_rank_as_cause)  # the first of the most likely
        user_error = all(end.code == ExitStatus.USER_ERROR for end in failed)
        failure = Failure(cause.rank, cause.node, describe_exit(cause.code), cause.lines)
        said = last_error(cause.lines)
        reason = f"rank {cause.rank} on {cause.node} {failure.exit}" + (f": {said}" if said else "")
        return Outcome(attempts.FAILED, reason, retry=not user_error, failure=failure)
    if any(end.code == ExitStatus.PREEMPTED for end in exits):
        if preempted:
            return Outcome(attempts.PREEMPTED, "asked to stop: saved")
        # By a file named STOP in the run's folder, or a signal to a rank.
        return Outcome(attempts.PREEMPTED, "stopped by a person, not by Slurm; saved", retry=False)
    return Outcome(attempts.FINISHED, "trained to the end")


def is_explained(exits: list[Exit]) -> bool:
    """Whether one of the failed processes reported a cause."""
    return any(_rank_as_cause(end) < _SILENT for end in exits if end.code not in PEACEFUL)


def _rank_as_cause(end: Exit) -> int:
    """Small for a likely cause, large for a likely echo."""
    if end.code < 0:
        return 0
    said = last_error(end.lines)
    if said is None:
        return _SILENT
    if _ECHOES.search(said):
        return _SILENT + 1
    if end.code != 1:
        return 1
    return 2


def last_error(lines: list[str]) -> str | None:
    """The line that says what went wrong: the last `error:` line, or the last line of a traceback.

    Echoes count only if there is nothing else: a rank whose watchdog has named another may see others exit before it
    exits itself.
    """
    errors = [line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")]
    for error in errors:
        if not _ECHOES.search(error):
            return error
    if errors:
        return errors[0]
    for line in reversed(lines):
        if re.match(r"(\w+\.)*\w*(Error|Exception|Exit|Interrupt|Failed|Timeout)\b", line):
            return line
    return None
