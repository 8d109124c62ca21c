"""What distributed tests share: the pool of workers, and the table of layouts at the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.memory_table import write_memory_table
from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """The session's pool; its processes end with the session."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def run_distributed(worker_pool: WorkerPool) -> Callable[..., Any]:
    """`run_distributed(function, world_size, *args, **kwargs)`: run it as a job of gloo processes.

    Returns rank 0's result, or every rank's in a list with `all_ranks=True`. `timeout_s` bounds the job (120 s).
    The function lives at the top level of a module and finds the default process group and RANK, WORLD_SIZE set.
    """

    def run(function: Callable, world_size: int, *args: Any, all_ranks: bool = False, **kwargs: Any) -> Any:
        results = worker_pool.run(function, world_size, *args, **kwargs)
        return results if all_ranks else results[0]

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what test_parity.py compared: the largest relative difference by layout, recompute and overlap; and what
    test_memory_estimates.py did."""
    write_memory_table(terminalreporter)
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name != "parity" or report.when != "call":
                    continue
                table, row, column, worst, tolerance = value
                mark = "" if worst <= tolerance else "!"
                tables.setdefault(table, {}).setdefault(row, {})[column] = f"{worst:.0e}{mark}"
    for table, rows in tables.items():
        terminalreporter.write_sep("-", f"parity with one process, {table}: largest relative difference (! above 1e-5)")
        for line in _aligned(rows):
            terminalreporter.write_line(line)


def _aligned(rows: dict[str, dict[str, str]]) -> Iterator[str]:
    columns = sorted({column for cells in rows.values() for column in cells}, key=_column_order)
    width = max(map(len, rows))
    widths = [max(len(column), 6) for column in columns]
    yield " " * width + "".join(f"  {column:>{size}}" for column, size in zip(columns, widths, strict=True))
    for row, cells in sorted(rows.items()):
        line = "".join(f"  {cells.get(column, '.'):>{size}}" for column, size in zip(columns, widths, strict=True))
        yield f"{row:{width}}{line}"


def _column_order(column: str) -> tuple[int, str]:
    recompute = ("none", "selective", "full")
    kind = column.split("+")[0]
    return recompute.index(kind) if kind in recompute else len(recompute), column
