"""The report as one HTML page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from plt_megatron.experiments.figures import Named
from plt_megatron.experiments.pages import render
from plt_megatron.experiments.report.results import SweepResults
from plt_megatron.experiments.report.tables import Table, csv_text
from plt_megatron.experiments.report.verdict import Verdict

SHORT = 16  # rows of a table that printing keeps on one page


def make_page(
    results: SweepResults,
    verdicts: Sequence[Verdict],
    tables: dict[str, tuple[str, Table]],
    figures: Sequence[Named],
) -> str:
    """The whole page. `tables`: id -> (heading, table)."""
    return render(
        "sweep.html",
        title=results.plan.title or results.plan.name,
        about=about(results),
        problems=results.problems,
        by_question=by_question(verdicts),
        tables=tables,
        figures=figures,
        short=SHORT,
        csv_text=csv_text,
        zip=zip,
    )


def about(results: SweepResults) -> str:
    """One line: what was planned and how much of it counts."""
    plan = results.plan
    held = f"held equal: {plan.match_budget.replace('_', ' ')}" if plan.match_budget else "nothing held equal"
    used = f"{len(results.used())} of {len(results.runs)} runs are used"
    compared = f"compared: {plan.compare}, against {plan.baseline}" if plan.compare else "nothing compared"
    return f"Sweep {plan.name}; {used}; {held}; {compared}."


def by_question(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Question -> its verdicts; a single one, of no group, where all groups have the same."""
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.question, []).append(verdict)
    return {
        question: [dataclasses.replace(own[0], group="")] if len({verdict.text for verdict in own}) == 1 else own
        for question, own in found.items()
    }
