"""Format durations, sizes, counts and tables as text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

# A number with short words, as in `38 %`, `2 h 40 min`, `12 of 300` or `1.2 [1.1, 1.3]`; or nothing.
_NUMERIC = re.compile(r"[-+±~<]?\d[\d.,]*\S{0,5}( (\S{1,5}|\(?[\d.,]+\)?|\[.*\]))*|[-?]?")
# Names of variables whose values are not for logs.
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|SAS", re.IGNORECASE)
_UNITS = {1000: ("B", "kB", "MB", "GB", "TB", "PB"), 1024: ("B", "KiB", "MiB", "GiB", "TiB", "PiB")}


def format_duration(seconds: float) -> str:
    """Format a duration as `0.42 s`, `4.2 s`, `38 s`, `3 min 05 s`, `2 h 40 min`, or `3.1 days`."""
    if seconds < 0.995:
        return f"{seconds:.2g} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min" if hours < 48 else f"{seconds / 86400:,.1f} days"


def format_bytes(size: float) -> str:
    """Format a file size in decimal units with three digits: `1.25 GB`, `12.5 MB`, `512 B`."""
    return _with_unit(size, 1000)


def format_memory(size: float) -> str:
    """Format a memory size in binary units with three digits: `80.0 GiB`."""
    return _with_unit(size, 1024)


def _with_unit(size: float, base: int) -> str:
    power = 0
    while size >= 0.9995 * base and power < len(_UNITS[base]) - 1:
        size, power = size / base, power + 1
    digits = 0 if power == 0 or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {_UNITS[base][power]}"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: `1 run`, `3 runs`, `1,000 processes`."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


def first_few(names: Sequence[str], most: int = 6) -> str:
    """List the first names: `a, b and 3 more`."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def pipe_row(cells: Iterable[str]) -> str:
    """Format a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def pipe_facts(facts: Iterable[tuple[str, Any]]) -> str:
    """Format names and values as a Markdown table."""
    return "\n".join(["| | |", "|---|---|", *(pipe_row([name, str(value)]) for name, value in facts)])


def format_table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), indent: int = 0) -> str:
    """Align columns, two spaces apart, whatever their width. Numeric columns other than the first are flush right.

    Rows may end early. A `header` is followed by a rule.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = max(map(len, [header, *rows]), default=0)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(columns):
        cells = [row[column] for row in rows if column < len(row)]
        is_numeric = column > 0 and any(cells) and all(map(_NUMERIC.fullmatch, cells))
        table.add_column(justify="right" if is_numeric else "left", no_wrap=True)
    for row in [header, *rows] if header else rows:
        table.add_row(*map(Text, row))
    # Any width: terminals wrap, and files are not truncated at 80 columns.
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = [" " * indent + line.rstrip() for line in captured.get().splitlines()]
    if header:
        lines.insert(1, " " * indent + "-" * (max(map(len, lines)) - indent))
    return "\n".join(lines)
