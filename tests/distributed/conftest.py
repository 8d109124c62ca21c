"""What distributed tests share: the pool of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="session")
def worker_pool(warm_python: str) -> Iterator[WorkerPool]:
    """The session's pool; its processes end with the session."""
    pool = WorkerPool(python=warm_python)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def run_distributed(worker_pool: WorkerPool) -> Callable[..., Any]:
    """`run_distributed(function, world_size, *args, **kwargs)`: run it as a job of gloo processes.

    Returns rank 0's result, or every rank's in a list with `all_ranks=True`. `timeout_s` bounds the job (120 s).
    The function lives at the top level of a module and finds the default process group and RANK, WORLD_SIZE set.
    """
    return _runner(worker_pool)


@pytest.fixture(scope="session")
def run_deepspeed() -> Iterator[Callable[..., Any]]:
    """As `run_distributed`, in workers that have DeepSpeed imported: in each it would take most of a job's time."""
    pool = WorkerPool("tests.distributed.deepspeed_jobs:enter")
    yield _runner(pool)
    pool.close()


def _runner(pool: WorkerPool) -> Callable[..., Any]:
    def run(function: Callable, world_size: int, *args: Any, all_ranks: bool = False, **kwargs: Any) -> Any:
        results = pool.run(function, world_size, *args, **kwargs)
        return results if all_ranks else results[0]

    return run
