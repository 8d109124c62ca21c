"""A study's report: one page, the answer first, with CSVs and PNGs beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.experiments.figures import Named, save
from plt_megatron.experiments.fits import Interval
from plt_megatron.experiments.pages import check_packages, render
from plt_megatron.experiments.report.page import SHORT
from plt_megatron.experiments.report.tables import Cell, Column, Table, csv_text, scores_table
from plt_megatron.experiments.study.decision import Frontier, Standing
from plt_megatron.experiments.study.figures import (
    PUBLISHED_PHI,
    curves_figure,
    frontier_figure,
    is_flat,
    phi_figure,
    residual_figure,
)
from plt_megatron.experiments.study.grid import Grid, source_of, start_step
from plt_megatron.experiments.study.knowledge import UNITS, Knowledge
from plt_megatron.experiments.study.law import LEVEL, LawFit
from plt_megatron.experiments.study.questions import HeldOut, equal_phis, hold_out_largest, profile
from plt_megatron.experiments.sweep_plan import SweepPlan
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.text import plural

FOLDER, PAGE = "report", "index.html"
Part = tuple[str, list[str], dict[str, Table], list[Named]]
_HOW = (
    "The percentage: how often a number of loops comes out best over the bootstrap of the law, each with its best "
    "shape within the limit. That is how sure the runs make it, if the law holds."
)


def write_report(grid: Grid, plan: SweepPlan, known: Knowledge, ended: str) -> Path:
    """Write the report into the study's folder; returns the page.

    Raises `UserError` if it cannot be written, or the extra `report` is missing.
    """
    check_packages()
    folder = plan.folder / FOLDER
    parts = [*_frontiers(known), *_domains(known), *_law(known), *_downstream(known), *_learning(known), _runs(known)]
    page = render(
        "study.html",
        title=plan.title,
        about=_about(grid, plan, known, ended),
        answers=[frontier.verdicts[0] for frontier in known.frontiers],
        no_law=known.no_law,
        how=_HOW,
        problems=known.problems(),
        parts=parts,
        short=SHORT,
        csv_text=csv_text,
        zip=zip,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for _, _, tables, figures in parts:
            for named in figures:
                save(named.figure, folder / f"{named.name}.png")
            for name, table in tables.items():
                write_text(folder / f"{name}.csv", table.csv())
        write_text(folder / PAGE, page)
    return folder / PAGE


def _about(grid: Grid, plan: SweepPlan, known: Knowledge, ended: str) -> str:
    rounds = max(int(run.labels["round"]) for run in plan.runs)
    used = sum(result.status == "used" for result in known.results)
    state = ended or "not finished"
    return (
        f"Study {grid.study.name}: {used} of {plural(len(plan.runs), 'run')} count, {plural(rounds, 'round')}; {state}."
    )


# ---------------------------------------------------------------- parts


def _frontiers(known: Knowledge) -> list[Part]:
    if known.fit is None:
        return []
    unit = UNITS[known.measure]
    flat = [f.question for f in known.frontiers if is_flat(f)]
    figures = [frontier_figure(f, known.fit.data.variants, unit) for f in known.frontiers if f.question not in flat]
    text = (
        f"No figure at equal {' and '.join(flat)}: the best shape that the budget allows is within the limit anywhere."
    )
    return [("Frontier", [text] if flat else [], {"standings": _standings(known.frontiers)}, figures)]


def _domains(known: Knowledge) -> list[Part]:
    """The answer for each validation source alone."""
    if not known.domains:
        return []
    columns = (
        Column("source", "source", is_text=True),
        Column("variant", "variant", is_text=True),
        Column("phi", "phi"),
        Column("answer", "at equal decoding latency", is_text=True),
    )
    rows = [
        [Cell(d.name, d.name), Cell(variant, variant), _number(phi, ".3f"), *_once(d.answer.text, place)]
        for d in known.domains
        for place, (variant, phi) in enumerate(d.fit.phis.items())
    ]
    return [
        ("Held-out sources", ["The same by bits per byte of each source alone."], {"sources": Table(columns, rows)}, [])
    ]


def _once(text: str, place: int) -> list[Cell]:
    return [Cell(text, text) if place == 0 else Cell("", "")]


def _standings(frontiers: Sequence[Frontier]) -> Table:
    columns = (
        Column("question", "at equal", is_text=True),
        Column("variant", "variant", is_text=True),
        Column("loops", "loops"),
        Column("share", "best in"),
        Column("loss", "expected loss"),
        Column("behind", "behind the best"),
        Column("parameters", "w/o embeddings"),
        Column("tokens", "tokens"),
        Column("decided", "decided", is_text=True),
    )
    rows = []
    for frontier in frontiers:
        for verdict in frontier.verdicts:
            for place, standing in enumerate(verdict.standings):
                first = [Cell(frontier.question, frontier.question), Cell(verdict.variant, verdict.variant)]
                decided = ("yes" if verdict.decided else "no") if place == 0 else ""
                rows.append([*first, *_standing_cells(standing), Cell(decided, decided)])
    notes = tuple(dict.fromkeys(v.beyond for f in frontiers for v in f.verdicts if v.beyond))
    return Table(columns, rows, tuple(f"Stretched far beyond the runs: {note}." for note in notes))


def _standing_cells(standing: Standing) -> list[Cell]:
    return [
        Cell(standing.loops, str(standing.loops)),
        Cell(standing.share, f"{standing.share:.0%}"),
        _number(standing.loss, ".3f"),
        _number(standing.behind, "+.4f"),
        Cell(standing.parameters, f"{standing.parameters:.3g}"),
        Cell(standing.model.tokens, f"{standing.model.tokens:.3g}"),
    ]


def _law(known: Knowledge) -> list[Part]:
    fit = known.fit
    if fit is None:
        return []
    held = _held_out(fit)
    blocks = plural(int(fit.data.blocks.max()) + 1, "block")
    text = [
        "L = E + A (N_once + r^phi N_loop)^-alpha + B D^-beta over parameters without embeddings and training tokens; "
        f"{plural(fit.data.n, 'run')}, {blocks}, root mean square of residuals {fit.rms_residual:.4f}."
    ]
    if held is not None:
        text.append(
            f"Predicted from the other sizes, {held.inside} of {len(held.rows)} runs of {held.what} lie within the "
            f"law's interval; the largest miss is {abs(held.seen - held.said).max():.4f}."
        )
    names = known.counted()
    profiles = [profile(fit, variant) for variant in fit.data.variants]
    law = ("Law", text, {"law": _coefficients(fit)}, [residual_figure(fit, names, held)])
    return [law, ("What a loop is worth", _comparisons(fit), {"phi": _phis(fit)}, [phi_figure(fit, profiles)])]


def _held_out(fit: LawFit) -> HeldOut | None:
    with contextlib.suppress(UserError):  # the other sizes are too few
        return hold_out_largest(fit)
    return None


def _comparisons(fit: LawFit) -> list[str]:
    """Nested tests of the first variant against each other."""
    first, *others = fit.data.variants
    return [f"{text[:1].upper()}{text[1:]}." for other in others for text in [equal_phis(fit, [first, other]).text]]


def _coefficients(fit: LawFit) -> Table:
    rows = [[Cell(name, name), *_ends(interval, ".4g")] for name, interval in fit.coefficients.items()]
    return Table(_columns("coefficient"), rows, (*fit.notes, _level()))


def _phis(fit: LawFit) -> Table:
    first, *others = fit.data.variants
    rows = [[Cell(name, name), *_ends(interval, ".3f")] for name, interval in fit.phis.items()]
    for other in others:
        label = f"{first} less {other}"
        rows.append([Cell(label, label), *_ends(fit.difference(first, other), "+.3f")])
    return Table(_columns("variant"), rows, (f"Published: {PUBLISHED_PHI} [0.41, 0.53] (arXiv 2604.21106).", _level()))


def _columns(first: str) -> tuple[Column, ...]:
    return Column(first, first, is_text=True), Column("value", "value"), Column("low", "from"), Column("high", "to")


def _level() -> str:
    return f"Intervals: {LEVEL:.0%}, by a block bootstrap over trunks (with their branches) and seeds."


def _learning(known: Knowledge) -> list[Part]:
    if not any(result.curve for result in known.results):
        return []
    return [("Learning curves", [], {}, [curves_figure(known.results)])]


def _downstream(known: Knowledge) -> list[Part]:
    table = scores_table([result for result in known.results if result.status == "used"])
    return [] if table is None else [("Downstream", [], {"scores": table}, [])]


def _runs(known: Knowledge) -> Part:
    columns = (
        Column("run", "run", is_text=True),
        Column("round", "round"),
        Column("status", "status", is_text=True),
        Column("loss", "loss"),
        Column("law", "less the law's"),
        Column("tokens", "tokens"),
        Column("from", "starts from", is_text=True),
        Column("reason", "why it does not count", is_text=True),
    )
    residuals = iter(known.fit.residuals.tolist() if known.fit is not None else [])
    rows: list[list[Cell]] = []
    counted = set(known.counted())
    for result in known.results:
        run, loss = result.run, result.loss
        residual = next(residuals, None) if run.name in counted else None
        source = f"{source_of(run)} at step {start_step(run)}" if source_of(run) else ""
        rows.append(
            [
                Cell(run.name, run.name),
                Cell(int(run.labels["round"]), run.labels["round"]),
                Cell(result.status, result.status),
                Cell(loss, "" if loss is None else f"{loss:.4f}"),
                Cell(residual, "" if residual is None else f"{residual:+.4f}"),
                Cell(run.tokens, f"{run.tokens:,}"),
                Cell(source, source),
                Cell(result.reason, result.reason),
            ]
        )
    return ("Runs", [], {"runs": Table(columns, rows)}, [])


def _ends(interval: Interval, form: str) -> list[Cell]:
    return [Cell(value, format(value, form)) for value in (interval.value, interval.low, interval.high)]


def _number(interval: Interval, form: str) -> Cell:
    text = f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
    return Cell(interval.value, text)
