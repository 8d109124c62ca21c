"""How a layout's outcome is compared with that of one process: conftest.py's fixture `check` does it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from tests.distributed.cases import Case, Layout, Outcome

TOLERANCE = 1e-5


def reference_of[T](train: Callable[[Case], T]) -> Callable[[Case], T]:
    """What a case is compared with: `train` of its reference, which is trained once."""
    train_once = functools.cache(train)
    return lambda case: train_once(case.reference)


def differences(outcome: Outcome, reference: Outcome, final: bool = True) -> dict[str, float]:
    """Relative differences of the numbers and, unless told otherwise, of the final parameters, by name."""
    assert outcome.numbers.keys() == reference.numbers.keys()
    wrong = {name: abs(outcome.numbers[name] - value) / abs(value) for name, value in reference.numbers.items()}
    if not final:
        return wrong
    assert outcome.final.keys() == reference.final.keys() == outcome.initial.keys()
    for name, value in reference.final.items():
        wrong[name] = float(np.abs(outcome.final[name] - value).max() / np.abs(value).max())
    return wrong


def reduction_failures(layout: Layout, case: Case, outcome: Outcome) -> list[str]:
    """With overlap, every rank's buckets are on their way before backward ends, from the second step on."""
    expected_share = [0, 1] if case.overlap else [0, 0]
    expected = [
        [(share * total, total) for share, (_, total) in zip(expected_share, steps, strict=True)]
        for steps in outcome.dispatched
    ]
    if outcome.dispatched == expected and len(expected) == layout.world_size:
        return []
    return [f"{layout}, {case}: bucket groups (sent before the end of backward, all) {outcome.dispatched}"]
