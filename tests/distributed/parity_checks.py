"""Compare a layout's outcome with that of one process."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tests.distributed.cases import STEPS, Case, Outcome

TOLERANCE = 1e-5


def reference_of(train: Callable[[Case], Outcome]) -> Callable[[Case], Outcome]:
    """Train the reference of a case, each one once."""

    @functools.cache
    def train_once(case: Case) -> Outcome:
        outcome = train(case)
        assert all(map(math.isfinite, outcome.numbers.values())), outcome.numbers
        return outcome

    return lambda case: train_once(case.reference)


def differences(outcome: Outcome, expected: Outcome, final: bool = True) -> dict[str, float]:
    """Relative differences of the numbers and, unless told otherwise, of the final parameters, by name; infinite where
    one is not a number."""
    assert outcome.numbers.keys() == expected.numbers.keys()
    pairs = {name: (outcome.numbers[name], value) for name, value in expected.numbers.items()}
    if final:
        assert outcome.final.keys() == expected.final.keys()
        pairs |= {name: (outcome.final[name], value) for name, value in expected.final.items()}
    return {name: _relative(*(np.asarray(part, dtype=np.float64) for part in pair)) for name, pair in pairs.items()}


def _relative(value: np.ndarray, expected: np.ndarray) -> float:
    if np.array_equal(value, expected, equal_nan=True):
        return 0.0
    off = float(np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-12))
    return off if np.isfinite(off) else np.inf


Record = Callable[[str, object], None]  # pytest's `record_property`


def compare(
    record: Record,
    table: str,
    cases: Iterable[Case],
    outcomes: Iterable[Outcome],
    reference: Callable[[Case], Outcome],
    rows: Iterable[str],
) -> None:
    """Assert that outcomes are the references'; the largest difference of each goes into the table."""
    failures = []
    for case, outcome, row in zip(cases, outcomes, rows, strict=True):
        expected = reference(case)
        for name, value in expected.initial.items():
            assert np.array_equal(outcome.initial[name], value), f"{row}, {case}: {name} starts differently"
        column = f"{case.recompute}{'+overlap' if case.overlap else ''}"
        failures += [f"{case}, {each}" for each in judge(record, differences(outcome, expected), table, row, column)]
        failures += [f"{row}, {case}: {each}" for each in _late_reductions(case, outcome.dispatched)]
    assert not failures, "\n".join(failures)


def judge(
    record: Record, wrong: dict[str, float], table: str, row: str, column: str, tolerance: float = TOLERANCE
) -> list[str]:
    """Put the largest of these differences into the table, and say whether it is too large."""
    worst = max(wrong, key=wrong.__getitem__)
    record("parity", [table, row, column, wrong[worst], tolerance])
    return [] if wrong[worst] <= tolerance else [f"{row}: {worst} is off by {wrong[worst]:.1e}"]


def _late_reductions(case: Case, dispatched: Sequence[Sequence[tuple[int, int]]]) -> list[str]:
    """With overlap, every rank's buckets are on their way before backward ends, once a loop count has been seen.

    In a step of fewer loops than the model has, nothing arrives for a bucket of nothing but gates.
    """
    loops = case.step_loops or (case.loops,) * STEPS
    for rank in dispatched:
        for step, (sent, groups) in enumerate(rank):
            expected = groups if case.overlap and loops[step] in loops[:step] else 0
            unused = expected > 0 and loops[step] == 1 < case.loops
            if not expected - unused <= sent <= expected or len(rank) != len(loops):
                return [f"bucket groups (sent before the end of backward, all) {dispatched}"]
    return []
