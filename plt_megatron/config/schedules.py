"""What the four schedules have in common: stages that follow one another, each up to its `until`.

Batches, row lengths and data count tokens, which stay the same when a run gets longer; loops count shares of the run,
which grow with it (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class Stage(Protocol):
    """A stage of a schedule; `until` is where it ends, in tokens or as a share of the run."""

    @property
    def until(self) -> float: ...


def starts(stages: Sequence[Stage]) -> list[float]:
    """Where each stage begins, and then where what follows the last one does."""
    return [0, *(stage.until for stage in stages)]


def find_order_problems(key: str, stages: Sequence[Stage]) -> Iterator[str]:
    """Stages of the schedule `key` that do not end after the one before them, one line each."""
    for number, (stage, begin) in enumerate(zip(stages, starts(stages), strict=False)):
        if stage.until <= begin:
            yield f"{key}[{number}].until {stage.until:,} must be above {begin:,}, where it begins"
