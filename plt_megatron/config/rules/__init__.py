"""Rules between settings, one file for each part of a configuration; `validation` checks them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def find_obstacle_problems(feature: str, obstacles: Mapping[str, bool], remedy: str) -> Iterator[str]:
    """Yield a line for each obstacle of a feature that is there: `feature obstacle remedy`, the remedy with its own
    punctuation."""
    for obstacle, is_there in obstacles.items():
        if is_there:
            yield f"{feature} {obstacle}{remedy}"
