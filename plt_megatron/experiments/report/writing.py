"""Writes the report of a sweep: a page, Markdown, CSVs and PNGs, into `report/` in the sweep's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.experiments.figures import Named, save
from plt_megatron.experiments.pages import check_packages
from plt_megatron.experiments.report.decode import DecodeProtocol, measure, read_measurement
from plt_megatron.experiments.report.figures import make_figures
from plt_megatron.experiments.report.laws import fit_laws
from plt_megatron.experiments.report.page import about, by_question, make_page
from plt_megatron.experiments.report.questions import Answer, answer_questions
from plt_megatron.experiments.report.results import SweepResults, load_results
from plt_megatron.experiments.report.rows import make_rows
from plt_megatron.experiments.report.tables import (
    Table,
    laws_table,
    main_table,
    questions_table,
    runs_table,
    scores_table,
)
from plt_megatron.experiments.report.verdict import Verdict, verdicts
from plt_megatron.experiments.sweep_plan import check_unpacked, records_of
from plt_megatron.run_folder.files import write_text, writing

FOLDER = "report"
PAGE, MARKDOWN = "index.html", "report.md"


@dataclass(frozen=True)
class Report:
    """Where the report is, and what to tell the user right away."""

    folder: Path
    verdicts: list[Verdict]
    answers: list[Answer]
    problems: list[str]


def write_report(sweep: str | Path, output: str | Path | None = None, decode: DecodeProtocol | None = None) -> Report:
    """Report on the sweep in the folder `sweep`.

    Args:
        output: the report's folder; None: `report` in the sweep's.
        decode: measure decoding time first; None: use what an earlier report measured, if anything.
    Raises `UserError` if there is no sweep, the report cannot be written, the extra `report` is missing, or an archived
    sweep is to be measured.
    """
    check_packages()
    if decode is not None:
        check_unpacked(Path(sweep))
    results = load_results(sweep)
    folder = Path(output) if output is not None else Path(sweep) / FOLDER
    measurement = measure(results, decode) if decode is not None else read_measurement(records_of(Path(sweep)))
    rows = make_rows(results, measurement.rows if measurement else {})
    found, answers, laws = verdicts(results, rows), answer_questions(results, rows), fit_laws(rows)
    tables = {
        **({"questions": ("Questions", questions_table(answers))} if answers else {}),
        "rows": ("Results", main_table(results, rows, measurement.conditions if measurement else None)),
        "laws": ("Scaling laws", laws_table(laws)),
        **({"scores": ("Downstream", scores)} if (scores := scores_table(results.used())) else {}),
        "runs": ("Runs", runs_table(results)),
    }
    figures = make_figures(rows, laws)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for named in figures:
            save(named.figure, folder / f"{named.name}.png")
        for name, (_, table) in tables.items():
            write_text(folder / f"{name}.csv", table.csv())
        write_text(folder / MARKDOWN, _markdown(results, found, tables, figures))
        write_text(folder / PAGE, make_page(results, found, tables, figures))
    return Report(folder, found, answers, results.problems)


def _markdown(
    results: SweepResults,
    found: Sequence[Verdict],
    tables: dict[str, tuple[str, Table]],
    figures: Sequence[Named],
) -> str:
    parts = [f"# {results.plan.title or results.plan.name}", about(results)]
    if results.problems:
        parts.append("\n".join(["**To know before believing it:**", "", *(f"- {text}" for text in results.problems)]))
    parts.append("## Answer")
    for question, own in by_question(found).items():
        for verdict in own:
            group = f"{verdict.group}, " if verdict.group else ""
            parts.append(f"**{group}at equal {question}:** {verdict.text.replace('+-', '±')}")
    for name, (heading, table) in tables.items():
        parts += [f"## {heading}", table.markdown()]
        if name == "rows":
            parts += [f"![{named.name}]({named.name}.png)\n\n{named.caption}" for named in figures]
    return "\n\n".join(parts) + "\n"
