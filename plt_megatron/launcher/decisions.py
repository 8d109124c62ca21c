"""Judge how an attempt ended and decide what follows: nothing, another attempt, one on other nodes, or giving up."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from plt_megatron.launcher.job import JobSettings
from plt_megatron.launcher.records import Exit, Outcome
from plt_megatron.run_folder.attempts import FAILED, FINISHED, PEACEFUL, PREEMPTED, ExitStatus, describe_exit
from plt_megatron.run_folder.text import plural

# Errors of a rank whose peer has died: echoes of another rank's failure.
_ECHOES = re.compile(
    r"[Cc]onnection (closed by peer|reset by peer|refused)|Broken pipe|lost the connection to another rank"
    r"|DistBackendError|DistNetworkError|DistStoreError|remote process exited|holds the job's store, does not answer"
    r"|ncclRemoteError|ncclSystemError"
)
_EXCEPTION = re.compile(
    r"(\w+\.)*\w*(Error|Exception|Exit|Interrupt|Failed|Timeout)\b|(\w+\.)+(OutOfResources|Unsupported)\b"
)
_RANK = re.compile(r"\[rank\d+\]: ?")  # torch puts it before every line of an uncaught exception
_IGNORED = re.compile(r"Exception ignored (in|while)\b")  # Python goes on after it

_SILENT = 3  # how a process without an error message ranks as the cause (`_rank_as_cause`)


def outcome_of(exits: list[Exit], preempted: bool) -> Outcome:
    """Judge how an attempt ended, from the ends of its processes in order of arrival."""
    failed = [end for end in exits if end.code not in PEACEFUL]
    if failed:
        cause = min(failed, key=_rank_as_cause)  # the first of the most likely
        user_error = all(end.code == ExitStatus.USER_ERROR for end in failed)
        said = last_error(cause.lines)
        reason = f"rank {cause.rank} on {cause.node} {describe_exit(cause.code)}" + (f": {said}" if said else "")
        return Outcome(FAILED, reason, retry=not user_error, failure=cause)
    if any(end.code == ExitStatus.PREEMPTED for end in exits):
        if preempted:
            return Outcome(PREEMPTED, "asked to stop")
        # By a file named STOP in the run's folder, or a signal to a rank.
        return Outcome(PREEMPTED, "stopped by a user, not by Slurm", retry=False)
    return Outcome(FINISHED, "trained to the end")


def is_explained(end: Exit) -> bool:
    """Check whether a process failed and reported a cause."""
    return end.code not in PEACEFUL and _rank_as_cause(end) < _SILENT


def _rank_as_cause(end: Exit) -> int:
    """Return a score, small for a likely cause and large for a likely echo."""
    if end.code < 0:
        # NCCL's own thread aborts a process whose peer is gone.
        is_echo = end.code == -signal.SIGABRT and any(map(_ECHOES.search, end.lines))
        return _SILENT + 1 if is_echo else 0
    said = last_error(end.lines)
    if said is None:
        return _SILENT
    if _ECHOES.search(said):
        return _SILENT + 1
    return 1 if end.code != 1 else 2


def last_error(lines: list[str]) -> str | None:
    """Return the line that says what went wrong: the last `error:` line, or the last line of a traceback.

    Echoes count only if there is nothing else: a rank whose watchdog has named another rank may see others exit before
    it exits itself.
    """
    lines = _without_ignored(_RANK.sub("", line, count=1) for line in lines)[::-1]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return next((error for error in errors if not _ECHOES.search(error)), errors[0])
    return next((line for line in lines if _EXCEPTION.match(line)), None)


def _without_ignored(lines: Iterable[str]) -> list[str]:
    """Return the lines without exceptions that Python has ignored, as those of objects it destroys at exit."""
    found, ignored = list[str](), False
    for line in lines:
        if _IGNORED.match(line):
            ignored = True
        elif not ignored:
            found.append(line)
        elif not line.startswith((" ", "Traceback")):  # the exception itself
            ignored = False
    return found


FINISH, AGAIN, EXCLUDE, HALT, STOP = "finish", "again", "exclude", "halt", "stop"
# Limit of attempts in a row without progress, whatever ends them: lost nodes and preemptions are nobody's fault, but a
# run that never has the time for a step will not finish either.
_MOST_FRUITLESS = 6


@dataclass(frozen=True)
class Decision:
    """The next action, with its reason in one line."""

    action: str  # finish; again; exclude: again, without `nodes`; halt: a user stopped it; stop: give up
    reason: str
    nodes: dict[str, str] = field(default_factory=dict)


def decide(events: list[dict[str, Any]], settings: JobSettings) -> Decision:
    """Decide what to do after a run's last attempt, from the run's events.

    Attempts before the run was given up do not count: someone has since fixed something and restarted it.
    """
    given_up = max((index for index, event in enumerate(events) if event["event"] == "stop"), default=-1)
    ends = [event for event in events[given_up + 1 :] if event["event"] == "end"]
    if not ends:  # for launchers that outlive their srun, after which the batch script has given the run up
        return Decision(STOP, events[given_up].get("reason", "given up"))
    last = ends[-1]
    reason = last["reason"]
    if last["status"] == FINISHED:
        return Decision(FINISH, reason)
    if last.get("bad_nodes"):
        if sum(bool(end.get("bad_nodes")) for end in _since_progress(ends)) <= settings.max_exclusions:
            return Decision(EXCLUDE, reason, last["bad_nodes"])
        times = plural(settings.max_exclusions, "time")
        return Decision(STOP, f"{reason}; the job has excluded bad nodes {times} since its last progress")
    if not last.get("retry", True):
        return Decision(HALT if last["status"] == PREEMPTED else STOP, reason)
    failures = _fruitless([end for end in ends if end["status"] == FAILED])
    if last["status"] == FAILED and failures >= settings.max_requeues_without_progress:
        again = {0: "", 1: " again"}.get(failures, f" {plural(failures, 'time')} more")
        reached = max(end.get("step") or 0 for end in ends)
        return Decision(STOP, f"{reason}; it has failed{again} since its last progress, step {reached}")
    if _fruitless(ends) >= _MOST_FRUITLESS:
        return Decision(STOP, f"{reason}; {_MOST_FRUITLESS} attempts in a row without progress, at step {last['step']}")
    return Decision(AGAIN, reason)


def _fruitless(ends: list[dict[str, Any]]) -> int:
    """Count the latest attempts in a row without progress, except for those whose bad nodes were found before training
    began."""
    return sum(not end.get("bad_nodes") for end in _since_progress(ends))


def _since_progress(ends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the latest attempts in a row that neither saved nor logged a step beyond earlier ones; one with bad nodes
    also if it did."""
    found, checkpoint, step = list[dict[str, Any]](), -1, -1
    for end in ends:
        bad = bool(end.get("bad_nodes"))
        least = 0 if bad else -1  # a first attempt that reached nothing counts as progress, unless nodes were at fault
        reached = (end.get("checkpoint") or 0, end.get("step") or 0)
        progressed = reached[0] > max(checkpoint, least) or reached[1] > max(step, least)
        found = [end] * bad if progressed else [*found, end]
        checkpoint, step = max(checkpoint, reached[0]), max(step, reached[1])
    return found
