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
    """Few combinations that cover all pairs, greedily: always the one that adds most pairs; of equal ones that of the
    smallest layout, which comes first in a combination."""
    bits: dict[Any, int] = {}
    masks = [
        sum(1 << bits.setdefault(pair, len(bits)) for pair in itertools.combinations(described(one), 2))
        for one in everything
    ]
    chosen: list[Any] = []
    missing = (1 << len(bits)) - 1
    while missing:
        best = max(
            range(len(masks)), key=lambda one: ((masks[one] & missing).bit_count(), -everything[one][0].world_size)
        )
        chosen.append(everything[best])
        missing &= ~masks[best]
    return chosen
