"""Tables at the end of the test run: layouts compared with one process, and estimated with measured memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def write_tables(reporter: Any) -> None:
    """Print what tests have recorded as `memory` and `parity`, if they have run."""
    _write_memory(reporter)
    _write_parity(reporter)


def _recorded(reporter: Any, wanted: str) -> list[Any]:
    return [
        value
        for outcome in ("passed", "failed")
        for report in reporter.stats.get(outcome, [])
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == wanted
    ]


def _write_memory(reporter: Any) -> None:
    """Rows: (layout, measured and estimated bytes of its worst rank)."""
    rows = _recorded(reporter, "memory")
    if not rows:
        return
    width = max(len(row) for row, *_ in rows)
    reporter.write_sep("-", "peak memory of a training step, MB (! more than 10 % off)")
    reporter.write_line(f"{'':{width}}  measured  estimated  difference")
    for row, measured, estimated in rows:
        off = estimated / measured - 1
        mark = " !" if abs(off) > 0.1 else ""
        reporter.write_line(f"{row:{width}}  {measured / 1e6:8.2f}  {estimated / 1e6:9.2f}  {100 * off:+9.1f}%{mark}")


def _write_parity(reporter: Any) -> None:
    """Cells: (table, row, column, largest relative difference, tolerance)."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    bounds: dict[str, set[float]] = {}
    for table, row, column, worst, tolerance in _recorded(reporter, "parity"):
        mark = "" if worst <= tolerance else "!"
        tables.setdefault(table, {}).setdefault(row, {})[column] = f"{worst:.0e}{mark}"
        bounds.setdefault(table, set()).add(tolerance)
    for table, rows in tables.items():
        bound = " or ".join(f"{tolerance:.0e}" for tolerance in sorted(bounds[table]))
        reporter.write_sep("-", f"parity with one process, {table}: largest relative difference (! above {bound})")
        for line in _aligned(rows):
            reporter.write_line(line)


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
