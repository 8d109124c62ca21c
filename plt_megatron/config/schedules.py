"""Common parts of the four schedules: consecutive stages, each of which ends at its `until`.

Batches, row lengths and data use token counts, which stay the same when a run gets longer; loops use shares of the
run, which grow with it (docs/decisions.md). After the last stage, all four go on with the setting that has no stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol


class Stage(Protocol):
    """A stage of a schedule; `until` is where it ends, in tokens or as a share of the run."""

    @property
    def until(self) -> float: ...


def starts(stages: Sequence[Stage]) -> list[float]:
    """Return where each stage begins, followed by where the last one ends."""
    return [0, *(stage.until for stage in stages)]


def find_problems(
    key: str, stages: Sequence[Stage], too_short: Callable[[int], str | None] = lambda number: None
) -> Iterator[str]:
    """Yield a line for each stage of the schedule `key` that does not end after the stage before it or, if all do, that
    is too short.

    Args:
        too_short: of a stage, by its index, what does not fit into it; None if it is long enough.
    """
    begins = starts(stages)
    backward = [number for number, stage in enumerate(stages) if stage.until <= begins[number]]
    for number in backward:
        yield f"{key}[{number}].until {stages[number].until:,} must be above {begins[number]:,}, where it begins"
    for number in range(0 if backward else len(stages)):
        missing = too_short(number)
        if missing is not None:
            yield f"{key}[{number}].until {stages[number].until:,}: {missing} in this stage; make it longer"
