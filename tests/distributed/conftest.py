"""What distributed tests share: pools of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.pool import WorkerPool, runner


@pytest.fixture(scope="session")
def run_deepspeed() -> Iterator[Callable[..., Any]]:
    """As `run_distributed`, in workers that have DeepSpeed imported: in each it would take most of a job's time."""
    pool = WorkerPool("tests.distributed.deepspeed_jobs:enter")
    yield runner(pool)
    pool.close()
