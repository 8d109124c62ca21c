"""Reports as files: one HTML page with everything in it, and its tables and figures as CSVs and PNGs beside it.

Templates have no scripts, and a page fetches nothing. HTML, Markdown and CSV share a table's cells, so that their
numbers agree.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plt_megatron.experiments.figures import Named, save, svg
from plt_megatron.experiments.intervals import Interval
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.text import pipe_row

TEMPLATES = Path(__file__).with_name("templates")
PAGE = "index.html"
SHORT = 16  # rows; printing keeps tables of at most this many on one page

# ---------------------------------------------------------------- tables

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: header in the CSV; `title`: header for readers.
        of: returns an item's value or cell. An `Interval` is written with its ends, or with `is_estimate` as
            "mean ± half". The half is a column of its own in the CSV, as are the ends with `has_ends`.
        form: number format; empty for text.
        shown: maximum characters of a text to show.
    """

    key: str
    title: str
    of: Callable[[Any], Value | Interval | Cell]
    form: str = ""
    is_estimate: bool = False
    has_ends: bool = False
    shown: int | None = None

    @property
    def is_text(self) -> bool:
        return not self.form

    @property
    def parts(self) -> list[str]:
        """What the values of a cell are."""
        return ["value", *(["interval"] if self.is_estimate else ["low", "high"] if self.has_ends else [])]

    def cell(self, item: Any) -> Cell:
        value = self.of(item)
        if isinstance(value, Cell):
            return value
        if self.is_estimate:
            if not isinstance(value, Interval):
                return Cell([None, None], "-")
            half = "" if value.half is None else f" ± {value.half:.4f}"
            return Cell([value.value, value.half], f"{value.value:{self.form}}{half}")
        if isinstance(value, Interval):
            cell = interval_cell(value, self.form)
            return Cell([*cell.values, value.low, value.high], cell.text) if self.has_ends else cell
        return Cell([value], "" if value is None else format(value, self.form)[: self.shown])


@dataclass(frozen=True)
class Cell:
    """A cell: `values` are unrounded, for the CSV; `text` is what readers see."""

    values: list[Value]
    text: str


def interval_cell(found: Interval, form: str) -> Cell:
    """Return a cell with the value and its ends in brackets; empty if the value is NaN."""
    text = found.text(form)
    return Cell([found.value if text else None], text)


def interval_columns(
    key: str, title: str, of: Callable[[Any], Interval | None], form: str, *, value: str = ""
) -> list[Column]:
    """Return columns for an interval's value and both ends. `value`: key of the first column, if it is not `key`."""

    def part(name: str) -> Callable[[Any], float | None]:
        return lambda item: None if (found := of(item)) is None else getattr(found, name)

    return [
        Column(value or key, title, part("value"), form),
        Column(f"{key}_low".strip("_"), "from", part("low"), form),
        Column(f"{key}_high".strip("_"), "to", part("high"), form),
    ]


class Table:
    def __init__(self, columns: Sequence[Column], items: Iterable[Any], notes: Sequence[str] = ()) -> None:
        self.columns, self.notes = columns, notes
        self.rows = [[column.cell(item) for column in columns] for item in items]

    def csv(self) -> str:
        """Return the table as CSV with unrounded values; a field without a value is empty."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([c.key if part == "value" else f"{c.key}_{part}" for c in self.columns for part in c.parts])
        writer.writerows([csv_text(value) for cell in row for value in cell.values] for row in self.rows)
        return stream.getvalue()

    def markdown(self) -> str:
        """Return the table as a pipe table, followed by the notes."""
        lines = [_pipes(column.title for column in self.columns)]
        lines.append(_pipes("---" if column.is_text else "---:" for column in self.columns))
        lines += [_pipes(cell.text for cell in row) for row in self.rows]
        lines += ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def csv_text(value: Value) -> str:
    """Format a value for the CSV; floats read back the same."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _pipes(cells: Iterable[str]) -> str:
    return pipe_row(" ".join(cell.split()) for cell in cells)


# ---------------------------------------------------------------- pages


@dataclass(frozen=True)
class Verdict:
    """The answer to a question.

    Attributes:
        question: what is held equal; `group`: the group it is about; each empty if a page has only one.
        winner: label of the winner; None if the data do not decide, or there are no contenders.
    """

    text: str
    decided: bool
    question: str = ""
    group: str = ""
    winner: str | None = None

    @property
    def asked(self) -> str:
        """The whole question, in words."""
        return ", ".join(filter(None, (self.group, f"at equal {self.question}" if self.question else "")))


@dataclass(frozen=True)
class Part:
    """A heading with paragraphs, figures, and tables by the stem of their files."""

    heading: str
    text: Sequence[str] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Sequence[Named] = ()


@dataclass(frozen=True)
class Page:
    """A report: the answers first, then reservations about them, then the evidence.

    Attributes:
        about: one line on what was done and how much of it counts.
        asked: heading of the answers; `how`: how they were obtained; `remarks`: further observations.
    """

    title: str
    about: str
    answers: Sequence[Verdict]
    parts: Sequence[Part]
    problems: Sequence[str] = ()
    asked: str = "Answer"
    how: str = ""
    remarks: Sequence[str] = ()

    def markdown(self) -> str:
        """Return the page as Markdown, with figures as links to their files."""
        parts = [f"# {self.title}", self.about]
        if self.problems:
            parts.append("\n".join(["**Caveats:**", "", *(f"- {text}" for text in self.problems)]))
        parts.append(f"## {self.asked}")
        parts += [f"**{answer.asked}:** {answer.text}" if answer.asked else answer.text for answer in self.answers]
        for part in self.parts:
            parts += [f"## {part.heading}", *part.text, *(table.markdown() for table in part.tables.values())]
            parts += [f"![{named.name}]({named.name}.png)\n\n{named.caption}" for named in part.figures]
        return "\n\n".join(parts) + "\n"


def write_page(page: Page, folder: Path, *, markdown: str = "", tables: bool = True) -> Path:
    """Write the page and its figures into `folder`, which is created; return the path of the page.

    Args:
        markdown: name of a file with the same content in Markdown; empty: none.
        tables: whether to write the tables as CSVs, too.

    Raises `UserError` if they cannot be written. Commands that write pages check for the extra `report` first.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for part in page.parts:
            for named in part.figures:
                save(named.figure, folder / f"{named.name}.png")
            for name, table in part.tables.items() if tables else ():
                write_text(folder / f"{name}.csv", table.csv())
        if markdown:
            write_text(folder / markdown, page.markdown())
        write_text(folder / PAGE, render("page.html", page=page))
    return folder / PAGE


def render(template: str, **values: Any) -> str:
    """Render a template. All values are escaped; the filter `svg` turns figures (`Named`) into `<svg>` elements."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = lambda named: Markup(svg(named))
    return environment.get_template(template).render(values, zip=zip, short=SHORT, csv_text=csv_text)
