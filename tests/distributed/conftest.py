"""Pools of workers, data of whole runs, and the comparison with one process."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from plt_megatron.config.schema import DataConfig
from tests.distributed.cases import Case, Layout, Outcome, train_cases
from tests.distributed.parity_checks import compare, reference_of
from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="session")
def run_deepspeed(warm_python: str) -> Iterator[Callable[..., Any]]:
    """Run as `run_distributed` does, in workers that have DeepSpeed: importing it would take most of a job's time."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (the extra `deepspeed`)")
    with contextlib.closing(WorkerPool("tests.distributed.deepspeed_jobs:enter", python=warm_python)) as pool:
        yield pool


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A small corpus, tokenized, and its tokenizer."""
    from tests.distributed.training_jobs import make_data

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(run_distributed) -> Callable[[Case], Outcome]:
    """A case's outcome on one process."""
    return reference_of(lambda case: run_distributed(train_cases, 1, Layout(), [case])[0])


@pytest.fixture
def check(run_distributed, reference, record_property) -> Callable[..., None]:
    """Train the cases in the layout and compare; what was found goes into the table."""

    def check(
        layout: Layout, cases: list[Case], table: str, names: list[str] | None = None, timeout_s: float = 240
    ) -> None:
        cases = [case.fitted(layout) for case in cases]
        outcomes = run_distributed(train_cases, layout.world_size, layout, cases, timeout_s=timeout_s)
        rows = [f"{name}, {layout}" for name in names] if names else [f"L{case.loops} {layout}" for case in cases]
        assert all(len(outcome.dispatched) == layout.world_size for outcome in outcomes)
        compare(record_property, table, cases, outcomes, reference, rows)

    return check
