"""Common parts of the four schedules: consecutive stages, each of which ends at its `until`.

Batches, row lengths and data use token counts, which stay the same when a run gets longer; loops use shares of the
run, which grow with it (docs/decisions.md). After the last stage, all four go on with the setting that has no stages.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol


class Stage(Protocol):
    """A stage of a schedule; `until` is where it ends, in tokens or as a share of the run."""

    @property
    def until(self) -> float: ...


class TokenSchedule:
    """Values that a run's steps have one after the other, each up to a number of tokens.

    A value takes effect at the first step that begins at or after the end of the previous one: no step is split.

    Args:
        ends: tokens at which each value but the last ends, ascending.
        values: in order of use, one more than `ends`.
    """

    def __init__(self, ends: Sequence[int], values: Sequence[int]) -> None:
        self._ends, self._values = ends, values

    def value(self, tokens: int) -> int:
        """Return the value in the step that follows `tokens`."""
        return self._values[bisect_right(self._ends, tokens)]

    def value_stretches(
        self, tokens: int, step_tokens: Callable[[int], int], *, steps: int | None = None, end: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yield (value, number of steps) for each stretch of steps with one value that follows `tokens`. The stretches
        cover `steps` steps, or all whole steps up to `end` tokens.

        Args:
            step_tokens: returns the tokens of a step, given its value.
        """
        number = bisect_right(self._ends, tokens)
        while number < len(self._values):
            value, stop = self._values[number], self._ends[number] if number < len(self._ends) else None
            own = step_tokens(value)
            wanted = None if stop is None else -((tokens - stop) // own)
            possible = steps if end is None else max(0, (end - tokens) // own)
            assert possible is not None, "give steps or end"
            taken = possible if wanted is None else min(wanted, possible)
            if taken:
                yield value, taken
            if wanted is None or taken < wanted:
                return
            tokens += taken * own
            steps = None if steps is None else steps - taken
            number = bisect_right(self._ends, tokens)


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
