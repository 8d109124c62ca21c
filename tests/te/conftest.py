"""The `te` group: Transformer Engine's own Python under megatron-core, on a CPU. Skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.pool import WorkerPool
from tests.te import emulation


@pytest.fixture(scope="session")
def te_pool() -> Iterator[WorkerPool]:
    """Workers that believe they have a GPU and Transformer Engine."""
    reason = emulation.find()
    if reason is not None:
        pytest.skip(reason)
    pool = WorkerPool("tests.te.emulation:enter")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def run_te(te_pool: WorkerPool) -> Callable[..., Any]:
    """`run_te(function, world_size, *args, all_ranks=False, timeout_s=120, **kwargs)`: as `run_distributed`."""

    def run(function: Callable, world_size: int, *args: Any, all_ranks: bool = False, **kwargs: Any) -> Any:
        results = te_pool.run(function, world_size, *args, **kwargs)
        return results if all_ranks else results[0]

    return run


@pytest.fixture(scope="session")
def run_plain() -> Iterator[Callable[..., Any]]:
    """The same in processes without Transformer Engine."""
    pool = WorkerPool()

    def run(function: Callable, world_size: int, *args: Any, **kwargs: Any) -> Any:
        return pool.run(function, world_size, *args, **kwargs)[0]

    yield run
    pool.close()
