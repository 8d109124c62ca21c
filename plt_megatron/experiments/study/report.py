"""A study's report: one page, the answer first, with CSVs and PNGs beside it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.experiments.intervals import LEVEL
from plt_megatron.experiments.law import LawFit
from plt_megatron.experiments.pages import (
    Answer,
    Column,
    Page,
    Part,
    Table,
    check_packages,
    interval_columns,
    write_page,
)
from plt_megatron.experiments.report.writing import scores_table
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
from plt_megatron.experiments.study.questions import HeldOut, equal_phis, hold_out_largest, profile
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan
from plt_megatron.run_folder.text import plural

FOLDER = "report"
_HOW = (
    "The percentage: how often a number of loops comes out best over the bootstrap of the law, each with its best "
    "shape within the limit. That is how sure the runs make it, if the law holds."
)
_INTERVALS = f"Intervals: {LEVEL:.0%}, by a block bootstrap over trunks (with their branches) and seeds."
# Of (frontier's question, verdict, standing, whether it is the verdict's first).
_STANDINGS = (
    Column("question", "at equal", lambda row: row[0]),
    Column("variant", "variant", lambda row: row[1].variant),
    Column("loops", "loops", lambda row: row[2].loops, "d"),
    Column("share", "best in", lambda row: row[2].share, ".0%"),
    Column("loss", "expected loss", lambda row: row[2].loss, ".3f"),
    Column("behind", "behind the best", lambda row: row[2].behind, "+.4f"),
    Column("parameters", "w/o embeddings", lambda row: row[2].parameters, ".3g"),
    Column("tokens", "tokens", lambda row: row[2].model.tokens, ".3g"),
    Column("decided", "decided", lambda row: ("yes" if row[1].decided else "no") if row[3] else ""),
)
# Of (domain, whether it is the domain's first variant, variant, phi).
_SOURCES = (
    Column("source", "source", lambda row: row[0].name),
    Column("variant", "variant", lambda row: row[2]),
    Column("phi", "phi", lambda row: row[3], ".3f"),
    Column("answer", "at equal decoding latency", lambda row: row[0].answer.text if row[1] else ""),
)
# Of (result, its residual).
_RUNS = (
    Column("run", "run", lambda row: row[0].run.name),
    Column("round", "round", lambda row: int(row[0].run.labels["round"]), "d"),
    Column("status", "status", lambda row: row[0].status),
    Column("loss", "loss", lambda row: row[0].loss, ".4f"),
    Column("law", "less the law's", lambda row: row[1], "+.4f"),
    Column("tokens", "tokens", lambda row: row[0].run.tokens, ","),
    Column("from", "starts from", lambda row: _start(row[0].run)),
    Column("reason", "why it does not count", lambda row: row[0].reason),
)


def write_report(grid: Grid, plan: SweepPlan, known: Knowledge, ended: str) -> Path:
    """Write the report into the study's folder; returns the page.

    Raises `UserError` if it cannot be written, or the extra `report` is missing.
    """
    check_packages()
    answers = [Answer(f"{f.verdicts[0].text}.", f.verdicts[0].decided) for f in known.frontiers[:1]]
    rounds = max(int(run.labels["round"]) for run in plan.runs)
    used = sum(result.status == "used" for result in known.results)
    page = Page(
        title=plan.title,
        about=f"Study {grid.study.name}: {used} of {plural(len(plan.runs), 'run')} count, {plural(rounds, 'round')}; "
        f"{ended or 'not finished'}.",
        answers=answers or [Answer(known.no_law, decided=False)],
        how=_HOW if answers else "",
        problems=known.problems(),
        parts=_parts(known),
    )
    return write_page(page, plan.folder / FOLDER)


def _parts(known: Knowledge) -> list[Part]:
    parts = []
    if known.fit is not None:
        parts.append(_frontiers(known, known.fit))
    if known.domains:
        rows = [(d, place == 0, *phi) for d in known.domains for place, phi in enumerate(d.fit.phis.items())]
        text = ["The same by bits per byte of each source alone."]
        parts.append(Part("Held-out sources", text, {"sources": Table(_SOURCES, rows)}))
    if known.fit is not None:
        parts += [_law(known, known.fit), _phis(known.fit)]
    scores = scores_table([result for result in known.results if result.status == "used"])
    if scores is not None:
        parts.append(Part("Downstream", tables={"scores": scores}))
    if any(result.curve for result in known.results):
        parts.append(Part("Learning curves", figures=[curves_figure(known.results)]))
    counted, residuals = set(known.counted()), iter(known.fit.residuals.tolist() if known.fit is not None else [])
    runs = [(r, next(residuals, None) if r.run.name in counted else None) for r in known.results]
    return [*parts, Part("Runs", tables={"runs": Table(_RUNS, runs)})]


def _frontiers(known: Knowledge, fit: LawFit) -> Part:
    flat = [f.question for f in known.frontiers if is_flat(f)]
    figures = [
        frontier_figure(f, fit.data.variants, UNITS[known.measure]) for f in known.frontiers if f.question not in flat
    ]
    text = (
        f"No figure at equal {' and '.join(flat)}: the best shape that the budget allows is within the limit anywhere."
    )
    rows = [
        (frontier.question, verdict, standing, place == 0)
        for frontier in known.frontiers
        for verdict in frontier.verdicts
        for place, standing in enumerate(verdict.standings)
    ]
    far = dict.fromkeys(v.beyond for f in known.frontiers for v in f.verdicts if v.beyond)
    table = Table(_STANDINGS, rows, [f"Stretched far beyond the runs: {note}." for note in far])
    return Part("Frontier", [text] if flat else [], {"standings": table}, figures)


def _law(known: Knowledge, fit: LawFit) -> Part:
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
    table = Table(_intervals("coefficient", ".4g"), fit.coefficients.items(), (*fit.notes, _INTERVALS))
    return Part("Law", text, {"law": table}, [residual_figure(fit, known.counted(), held)])


def _held_out(fit: LawFit) -> HeldOut | None:
    with contextlib.suppress(UserError):  # the other sizes are too few
        return hold_out_largest(fit)
    return None


def _phis(fit: LawFit) -> Part:
    """Each phi, the first variant's against the others', and nested tests of whether two are equal."""
    first, *others = fit.data.variants
    tests = [equal_phis(fit, [first, other]).text for other in others]
    rows = [*fit.phis.items(), *((f"{first} less {other}", fit.difference(first, other)) for other in others)]
    notes = (f"Published: {PUBLISHED_PHI} [0.41, 0.53] (arXiv 2604.21106).", _INTERVALS)
    profiles = [profile(fit, variant) for variant in fit.data.variants]
    return Part(
        "What a loop is worth",
        [f"{text[:1].upper()}{text[1:]}." for text in tests],
        {"phi": Table(_intervals("variant", ".3f"), rows, notes)},
        [phi_figure(fit, profiles)],
    )


def _intervals(name: str, form: str) -> list[Column]:
    """Columns for rows of (name, interval)."""
    ends = interval_columns("", "value", lambda row: row[1], form, value="value")
    return [Column(name, name, lambda row: row[0]), *ends]


def _start(run: PlannedRun) -> str:
    return f"{source_of(run)} at step {start_step(run)}" if source_of(run) else ""
