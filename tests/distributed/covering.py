"""Few combinations of settings in which each pair of them occurs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Described = Callable[[Any], Iterable[tuple[Any, Any]]]  # a combination's settings: (axis, value)


def pairs(combinations: Iterable[Any], described: Described) -> set[Any]:
    """Pairs of settings that occur together."""
    return {pair for one in combinations for pair in itertools.combinations(described(one), 2)}


def covering_design(everything: Sequence[Any], described: Described) -> list[Any]:
    """Few of them in which each pair that occurs at all occurs: the one that adds most pairs, again and again; of equal
    ones that of the smallest layout, which comes first in a combination."""
    chosen: list[Any] = []
    missing = pairs(everything, described)
    while missing:
        best = max(everything, key=lambda one: (len(pairs([one], described) & missing), -one[0].world_size))
        chosen.append(best)
        missing -= pairs([best], described)
    return chosen
