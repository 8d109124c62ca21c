"""The table of test_memory_estimates.py at the end of the test run."""

from __future__ import annotations

from typing import Any


def write_memory_table(terminalreporter: Any) -> None:
    """Measured and estimated peak of each layout's worst rank, if those tests have run."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "memory"
    ]
    if not rows:
        return
    width = max(len(row) for row, *_ in rows)
    terminalreporter.write_sep("-", "peak memory of a training step, MB (! more than 10 % off)")
    terminalreporter.write_line(f"{'':{width}}  measured  estimated  difference")
    for row, measured, estimated in rows:
        off = estimated / measured - 1
        mark = " !" if abs(off) > 0.1 else ""
        terminalreporter.write_line(
            f"{row:{width}}  {measured / 1e6:8.2f}  {estimated / 1e6:9.2f}  {100 * off:+9.1f}%{mark}"
        )
