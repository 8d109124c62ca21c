"""Common parts of the four schedules: consecutive stages, each of which ends at its `until`.

Batches, row lengths and data use token counts, which stay the same when a run gets longer; loops use shares of the
run, which grow with it (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class Stage(Protocol):
    """A stage of a schedule; `until` is where it ends, in tokens or as a share of the run."""

    @property
    def until(self) -> float: ...


def starts(stages: Sequence[Stage]) -> list[float]:
    """Return where each stage begins, followed by where the last one ends."""
    return [0, *(stage.until for stage in stages)]


def find_order_problems(key: str, stages: Sequence[Stage]) -> Iterator[str]:
    """Yield a line for each stage of the schedule `key` that does not end after the stage before it."""
    for number, (stage, begin) in enumerate(zip(stages, starts(stages), strict=False)):
        if stage.until <= begin:
            yield f"{key}[{number}].until {stage.until:,} must be above {begin:,}, where it begins"
