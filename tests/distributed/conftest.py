"""What distributed tests share: pools of workers, and the comparison with one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.distributed.cases import Case, Layout, Outcome, train_cases
from tests.distributed.parity_checks import TOLERANCE, differences, reduction_failures, reference_of
from tests.distributed.pool import WorkerPool, runner


@pytest.fixture(scope="session")
def run_deepspeed(warm_python: str) -> Iterator[Callable[..., Any]]:
    """As `run_distributed`, in workers that have DeepSpeed imported: in each it would take most of a job's time."""
    pool = WorkerPool("tests.distributed.deepspeed_jobs:enter", python=warm_python)
    yield runner(pool)
    pool.close()


@pytest.fixture(scope="module")
def reference(run_distributed) -> Callable[[Case], Outcome]:
    """A case's outcome on one process."""
    return reference_of(lambda case: run_distributed(train_cases, 1, Layout(), [case])[0])


@pytest.fixture
def check(run_distributed, reference, record_property) -> Callable[..., None]:
    """Train the cases in the layout and compare; what was found goes into the table."""

    def check(layout: Layout, cases: list[Case], table: str, names: list[str] | None = None) -> None:
        failures = []
        outcomes = run_distributed(train_cases, layout.world_size, layout, cases, timeout_s=240)
        for index, (case, outcome) in enumerate(zip(cases, outcomes, strict=True)):
            expected = reference(case)
            for name, value in expected.initial.items():
                assert np.array_equal(outcome.initial[name], value), f"{layout}, {case}: {name} starts differently"
            wrong = differences(outcome, expected)
            worst = max(wrong, key=lambda name: wrong[name] if wrong[name] == wrong[name] else np.inf)
            row = f"L{case.loops} {layout}" if names is None else f"{names[index]}, {layout}"
            column = f"{case.recompute}{'+overlap' if case.overlap else ''}"
            record_property("parity", [table, row, column, wrong[worst], TOLERANCE])
            if not wrong[worst] <= TOLERANCE:
                failures.append(f"{layout}, {case}: {worst} is off by {wrong[worst]:.1e}")
            failures.extend(reduction_failures(layout, case, outcome))
        assert not failures, "\n".join(failures)

    return check
