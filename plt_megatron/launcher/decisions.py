"""Decides what follows an attempt: nothing, another attempt, another one on other nodes, or giving up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from plt_megatron.launcher.job import JobSettings
from plt_megatron.run_folder.attempts import FAILED, FINISHED, PREEMPTED
from plt_megatron.run_folder.text import plural

FINISH, AGAIN, EXCLUDE, HALT, STOP = "finish", "again", "exclude", "halt", "stop"
# Attempts in a row without progress, whatever ends them: lost nodes and preemptions are nobody's fault, but a run that
# never gets the time for a step will not finish either.
_MOST_FRUITLESS = 6


@dataclass(frozen=True)
class Decision:
    """What to do, and why, in one line.

    Attributes:
        action: finish; again; exclude: again, without `nodes`; halt: a person stopped it; stop: give up.
    """

    action: str
    reason: str
    nodes: dict[str, str] = field(default_factory=dict)


def decide(events: list[dict[str, Any]], settings: JobSettings) -> Decision:
    """What to do, given a run's events, after its last attempt.

    Attempts before the run was given up do not count: somebody has fixed something and restarted it.
    """
    ends = _ends_since_stop(events)
    last = ends[-1]
    reason = last["reason"]
    if last["status"] == FINISHED:
        return Decision(FINISH, reason)
    if last.get("bad_nodes"):
        exclusions = sum(bool(end.get("bad_nodes")) for end in ends)
        if exclusions <= settings.max_exclusions:
            return Decision(EXCLUDE, reason, last["bad_nodes"])
        return Decision(
            STOP, f"{reason}; the job has already excluded bad nodes {plural(settings.max_exclusions, 'time')}"
        )
    if not last.get("retry", True):
        return Decision(HALT if last["status"] == PREEMPTED else STOP, reason)
    failures = _fruitless([end for end in ends if end["status"] == FAILED])
    if last["status"] == FAILED and failures >= settings.max_requeues_without_progress:
        return Decision(STOP, f"{reason}; {_times(failures)} since its last progress, step {last['step']}")
    if _fruitless(ends) >= _MOST_FRUITLESS:
        return Decision(STOP, f"{reason}; {_MOST_FRUITLESS} attempts in a row without progress, at step {last['step']}")
    return Decision(AGAIN, reason)


def _times(failures: int) -> str:
    return "it has failed again" if failures == 1 else f"it has failed {plural(failures, 'time')} more"


def _ends_since_stop(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ends: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "stop":
            ends = []
        elif event["event"] == "end":
            ends.append(event)
    assert ends, "an attempt has ended"
    return ends


def _fruitless(ends: list[dict[str, Any]]) -> int:
    """The number of last attempts that neither saved nor logged a step beyond earlier ones."""
    count, checkpoint, step = 0, -1, -1
    for end in ends:
        if end.get("bad_nodes"):
            continue  # found before training began
        reached = (end.get("checkpoint") or 0, end.get("step") or 0)
        count = 0 if reached[0] > checkpoint or reached[1] > step else count + 1
        checkpoint, step = max(checkpoint, reached[0]), max(step, reached[1])
    return count
