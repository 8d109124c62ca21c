"""The report as one HTML page: everything inside it, no script, nothing fetched."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

from plt_megatron.experiments.report.figures import Named, svg
from plt_megatron.experiments.report.results import SweepResults
from plt_megatron.experiments.report.tables import Table, csv_text
from plt_megatron.experiments.report.verdict import Verdict

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; color: #1d2129;
  background: #fff; max-width: 82rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d9dce1; padding-bottom: .25rem; }
p.about, p.note, figcaption { color: #545b66; font-size: .87rem; margin: .35rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .45rem; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; border-bottom: 2px solid #1d2129; font-weight: 600; }
td { border-bottom: 1px solid #e6e8eb; }
th.text, td.text { text-align: left; }
td.wrap { white-space: normal; min-width: 14rem; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; }
ul.problems { background: #fdf1e3; border-left: 4px solid #d55e00; padding: .7rem 1rem .7rem 2rem; margin: 1rem 0; }
dl { margin: 0; } dt { font-weight: 600; margin-top: .7rem; } dd { margin: 0; }
dd.decided { border-left: 4px solid #009e73; padding-left: .7rem; }
dd.open { border-left: 4px solid #b5bac2; padding-left: .7rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: 1.4rem; }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  :root { font-size: 9.5pt; } body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0; }
  .scroll { overflow: visible; } table { font-size: 7pt; } th, td { padding: .2rem .35rem; }
  td { white-space: normal; } td.number { white-space: nowrap; } td.wrap { min-width: 6rem; }
  .short { break-inside: avoid; } thead { display: table-header-group; } tr, dt, dd, li { break-inside: avoid; }
  h2, dt { break-after: avoid; } p.note { break-before: avoid; } dd.decided, dd.open, ul.problems, th, td {
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .figures { grid-template-columns: 1fr 1fr; gap: 5mm; }
  td:first-child, th:first-child { position: static; }
}
"""

_SHORT = 16  # rows of a table that printing keeps on one page


def make_page(
    results: SweepResults,
    verdicts: Sequence[Verdict],
    tables: dict[str, tuple[str, Table]],
    figures: Sequence[Named],
) -> str:
    """The whole page. `tables`: id -> (heading, table)."""
    plan = results.plan
    title = html.escape(plan.title or plan.name)
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>',
        f'<h1>{title}</h1><p class="about">{html.escape(about(results))}</p>',
        _problems(results),
        "<h2>Answer</h2>",
        _verdicts(verdicts),
    ]
    for name, content in tables.items():
        parts.append(_section(name, content))
        if name == "rows" and figures:
            parts.append(_figures(figures))
    parts.append("</body></html>")
    return "\n".join(part for part in parts if part) + "\n"


def about(results: SweepResults) -> str:
    """One line: what was planned and how much of it counts."""
    plan = results.plan
    held = f"held equal: {plan.match_budget.replace('_', ' ')}" if plan.match_budget else "nothing held equal"
    used = f"{len(results.used())} of {len(results.runs)} runs are used"
    compared = f"compared: {plan.compare}, against {plan.baseline}" if plan.compare else "nothing compared"
    return f"Sweep {plan.name}; {used}; {held}; {compared}."


def _problems(results: SweepResults) -> str:
    if not results.problems:
        return ""
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in results.problems)
    return f'<ul class="problems" id="problems">{items}</ul>'


def by_question(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Question -> its verdicts; a single one, of no group, where all groups have the same."""
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.question, []).append(verdict)
    return {
        question: [dataclasses.replace(own[0], group="")] if len({verdict.text for verdict in own}) == 1 else own
        for question, own in found.items()
    }


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    items = []
    for question, found in by_question(verdicts).items():
        items.append(f"<dt>At equal {question}</dt>")
        for verdict in found:
            group = f"<b>{html.escape(verdict.group)}:</b> " if verdict.group else ""
            kind = "open" if verdict.winner is None else "decided"
            items.append(f'<dd class="{kind}">{group}{html.escape(_sentence(verdict.text))}</dd>')
    return f'<dl id="verdicts">{"".join(items)}</dl>'


def _sentence(text: str) -> str:
    text = text.replace("+-", "±")
    return text[:1].upper() + text[1:]


def _figures(figures: Sequence[Named]) -> str:
    items = "".join(
        f"<figure>{svg(named)}<figcaption>{html.escape(named.caption)}</figcaption></figure>" for named in figures
    )
    return f'<h2>Figures</h2><div class="figures">{items}</div>'


def _section(name: str, content: tuple[str, Table]) -> str:
    heading, table = content
    shown = [column for column in table.columns if not column.is_interval]
    head = "".join(f'<th scope="col"{_text_class(column.is_text)}>{html.escape(column.title)}</th>' for column in shown)
    body = []
    for row in table.rows:
        cells = []
        for column, values, text in table.shown_cells(row):
            wrap = " wrap" if column.is_text and len(text) > 60 else ""
            data = "".join(
                f' data-{name}="{html.escape(csv_text(value), quote=True)}"'
                for name, value in zip(("value", "interval"), values, strict=False)
            )
            cells.append(f"<td{_text_class(column.is_text, wrap)}{data}>{html.escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    kind = ' class="short"' if len(table.rows) <= _SHORT else ""
    return (
        f'<h2>{html.escape(heading)}</h2><div{kind}><div class="scroll"><table id="{name}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{notes}</div>"
    )


def _text_class(is_text: bool, more: str = "") -> str:
    return f' class="text{more}"' if is_text else ' class="number"'
