"""The suite's matrix: the largest relative difference from one process, by layout, recomputation and overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def write_parity_table(terminalreporter: Any) -> None:
    """What tests recorded as `parity`: (table, row, column, largest relative difference, tolerance)."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    bounds: dict[str, set[float]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name != "parity" or report.when != "call":
                    continue
                table, row, column, worst, tolerance = value
                mark = "" if worst <= tolerance else "!"
                tables.setdefault(table, {}).setdefault(row, {})[column] = f"{worst:.0e}{mark}"
                bounds.setdefault(table, set()).add(tolerance)
    for table, rows in tables.items():
        bound = " or ".join(f"{tolerance:.0e}" for tolerance in sorted(bounds[table]))
        terminalreporter.write_sep(
            "-", f"parity with one process, {table}: largest relative difference (! above {bound})"
        )
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
