"""Write a study's report: one page that begins with the answer, with CSVs and PNGs beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.errors import UserError
from plt_megatron.experiments.figures import LINES, MARKERS, TOKENS, Curve, Named, Panel, draw, limits_around
from plt_megatron.experiments.intervals import LEVEL
from plt_megatron.experiments.law import HeldOut, LawFit, equal_phis, hold_out_largest, profile
from plt_megatron.experiments.pages import Cell, Column, Page, Part, Table, Verdict, interval_columns, write_page
from plt_megatron.experiments.records import RunResult
from plt_megatron.experiments.study.decision import Frontier
from plt_megatron.experiments.study.grid import ONE_LOOP, Grid, source_of, start_step
from plt_megatron.experiments.study.knowledge import UNITS, Knowledge
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan
from plt_megatron.experiments.sweep_report import FOLDER, scores_table
from plt_megatron.run_folder.text import plural

PUBLISHED_PHI = 0.46  # arXiv 2604.21106
_MOST_SIZES = 6  # maximum number of panels of learning curves
_GREY = "#555555"
_HOW = (
    "Percentages: how often a number of loops comes out best over the bootstrap of the law, each with its best shape "
    "within the limit. They measure confidence, if the law holds."
)
_INTERVALS = f"Intervals: {LEVEL:.0%}, by a block bootstrap over trunks (with their branches) and seeds."
# Columns for (frontier's question, verdict, standing, whether it is the verdict's first).
_STANDINGS = (
    Column("question", "at equal", lambda row: row[0]),
    Column("variant", "variant", lambda row: row[1].group),
    Column("loops", "loops", lambda row: row[2].run.loops, "d"),
    Column("share", "best in", lambda row: Cell([row[2].share], row[2].best_in), ".0%"),
    Column("loss", "expected loss", lambda row: row[2].loss, ".3f", has_ends=True),
    Column("behind", "behind the best", lambda row: row[2].behind, "+.4f", has_ends=True),
    Column("parameters", "w/o embeddings", lambda row: row[2].run.once + row[2].run.looped, ".3g"),
    Column("tokens", "tokens", lambda row: row[2].run.tokens, ".3g"),
    Column("decided", "decided", lambda row: ("yes" if row[1].decided else "no") if row[3] else ""),
)
# Columns for (domain, whether it is the domain's first variant, variant, phi).
_SOURCES = (
    Column("source", "source", lambda row: row[0].name),
    Column("variant", "variant", lambda row: row[2]),
    Column("phi", "phi", lambda row: row[3], ".3f", has_ends=True),
    Column("answer", "at equal decoding latency", lambda row: row[0].answer.text if row[1] else ""),
)


def _run_columns(measure: str) -> tuple[Column, ...]:
    """Return the columns for (result, its residual in the unit of `measure`)."""
    return (
        Column("run", "run", lambda row: row[0].run.name),
        Column("round", "round", lambda row: int(row[0].run.labels["round"]), "d"),
        Column("status", "status", lambda row: row[0].status),
        Column("loss", "loss, nats per token", lambda row: row[0].loss, ".4f"),
        Column("law", f"{UNITS[measure]}, less the law's", lambda row: row[1], "+.4f"),
        Column("tokens", "tokens", lambda row: row[0].run.tokens, ","),
        Column("from", "starts from", lambda row: _start(row[0].run)),
        Column("reason", "why it does not count", lambda row: row[0].reason),
    )


def write_report(grid: Grid, plan: SweepPlan, known: Knowledge, ended: str) -> Path:
    """Write the report into the study's folder; return the path of its page.

    Raises `UserError` like `write_page`.
    """
    answers = [Verdict(f"{f.verdicts[0].text}.", f.verdicts[0].decided) for f in known.frontiers[:1]]
    rounds = max(int(run.labels["round"]) for run in plan.runs)
    used = sum(result.status == "used" for result in known.results)
    page = Page(
        title=plan.title,
        about=f"Study {grid.study.name}: {used} of {plural(len(plan.runs), 'run')} count, {plural(rounds, 'round')}; "
        f"{ended or 'not finished'}.",
        answers=answers or [Verdict(known.no_law, decided=False)],
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
        text = ["The same for each source alone, in bits per byte."]
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
    return [*parts, Part("Runs", tables={"runs": Table(_run_columns(known.measure), runs)})]


def _frontiers(known: Knowledge, fit: LawFit) -> Part:
    flat = [f.question for f in known.frontiers if is_flat(f)]
    figures = [
        frontier_figure(f, fit.data.variants, UNITS[known.measure]) for f in known.frontiers if f.question not in flat
    ]
    text = f"No figure at equal {' and '.join(flat)}: the best shape that the budget allows is always within the limit."
    rows = [
        (frontier.question, verdict, standing, place == 0)
        for frontier in known.frontiers
        for verdict in frontier.verdicts
        for place, standing in enumerate(verdict.standings)
    ]
    far = dict.fromkeys(v.beyond for f in known.frontiers for v in f.verdicts if v.beyond)
    table = Table(_STANDINGS, rows, [f"Extrapolated far beyond the runs: {note}." for note in far])
    return Part("Frontier", [text] if flat else [], {"standings": table}, figures)


def _law(known: Knowledge, fit: LawFit) -> Part:
    held = None
    with contextlib.suppress(UserError):  # the other sizes are too few
        held = hold_out_largest(fit)
    blocks = plural(int(fit.data.blocks.max()) + 1, "block")
    text = [
        "L = E + A (N_once + r^phi N_loop)^-alpha + B D^-beta over parameters without embeddings and training tokens; "
        f"{plural(fit.data.n, 'run')}, {blocks}, root mean square of residuals {fit.rms_residual:.4f}."
    ]
    if held is not None:
        text.append(
            f"Predicted from the other sizes, {held.inside} of {len(held.seen)} runs of the largest size lie within "
            f"the law's interval; the largest miss is {abs(held.seen - held.said).max():.4f}."
        )
    table = Table(_intervals("coefficient", ".4g"), fit.coefficients.items(), (*fit.notes, _INTERVALS))
    return Part("Law", text, {"law": table}, [residual_figure(fit, known.counted(), held)])


def _phis(fit: LawFit) -> Part:
    """Report each phi, the first variant's against the others', and nested tests of whether they are equal."""
    first, *others = fit.data.variants
    tests = [_are_equal(first, other, equal_phis(fit, [first, other])) for other in others]
    rows = [*fit.phis.items(), *((f"{first} less {other}", fit.difference(first, other)) for other in others)]
    notes = (f"Published: {PUBLISHED_PHI} [0.41, 0.53] (arXiv 2604.21106).", _INTERVALS)
    table = Table(_intervals("variant", ".3f"), rows, notes)
    return Part("What a loop is worth", tests, {"phi": table}, [phi_figure(fit)])


def _are_equal(first: str, other: str, p: float) -> str:
    value = "p < 0.01" if p < 0.01 else f"p = {p:.2f}"
    return f"Phi of {first} and {other}: {'different' if p < 0.05 else 'not told apart'} ({value})."


def _intervals(name: str, form: str) -> list[Column]:
    """Return columns for rows of (name, interval)."""
    ends = interval_columns("", "value", lambda row: row[1], form, value="value")
    return [Column(name, name, lambda row: row[0]), *ends]


def _start(run: PlannedRun) -> str:
    return f"{source_of(run)} at step {start_step(run)}" if source_of(run) else ""


# ---------------------------------------------------------------- figures


def frontier_figure(frontier: Frontier, variants: Sequence[str], unit: str) -> Named:
    """Plot the loss in `unit` against the quantity held equal, with a color per number of loops and a line style per
    variant."""
    curves = []
    for own in frontier.curves:
        line = LINES[variants.index(own.variant) % len(LINES)] if own.loops > 1 else "-"
        label = "1 loop" if own.loops == 1 else f"{own.variant}, {plural(own.loops, 'loop')}"
        band = (own.low, own.high) if own.loops == 1 or own.variant == variants[0] else None
        curves.append(Curve(own.x, own.loss, own.loops - 1, line, label=label, band=band))
    target = float(frontier.curves[0].x[len(frontier.curves[0].x) // 2])
    panel = Panel(
        curves,
        frontier.axis,
        f"expected loss ({unit})",
        log_x=True,
        at=target,
        limits=_limits(frontier, target),
        legend=8,
        beside=True,
    )
    caption = f"At equal {frontier.question}: the best shape of each. Dotted: the target of the answer."
    name = f"frontier_{frontier.question.replace(' ', '_').lower()}"
    return Named(name, f"{caption} Bands: 95 % of the law's bootstrap.", draw([panel], 8.2, 4.2))


def _limits(frontier: Frontier, target: float) -> tuple[float, float] | None:
    """Return y limits for the curves near the target, plus as much for bands: the full range would flatten them."""
    near = [(c, np.abs(np.log(c.x / target)) < np.log(10)) for c in frontier.curves]
    values = _finite([c.loss[here] for c, here in near])
    if not len(values):
        return None
    bands = _finite([rows[here] for c, here in near for rows in (c.loss, c.low, c.high)])
    span = max(float(np.ptp(values)), 1e-3)
    low, high = max(bands.min(), values.min() - span), min(bands.max(), values.max() + span)
    return low - 0.1 * span, high + 0.1 * span


def is_flat(frontier: Frontier) -> bool:
    """Return whether every contender's loss is constant along the axis."""
    curves = [_finite([curve.loss]) for curve in frontier.curves]
    return all(len(values) == 0 or float(np.ptp(values)) < 1e-9 for values in curves)


def _finite(rows: Sequence[np.ndarray]) -> np.ndarray:
    values = np.concatenate(rows)
    return values[np.isfinite(values)]


def phi_figure(fit: LawFit) -> Named:
    """Plot how much worse the law fits if a phi is fixed elsewhere, with each phi's interval below."""
    curves = []
    for place, (variant, phi) in enumerate(fit.phis.items()):
        values, excess = profile(fit, variant)
        level = -0.08 * (place + 1)
        thick = {"linewidth": 3, "solid_capstyle": "butt"}
        curves += [
            Curve(values, excess, place, label=f"{variant}: {phi.value:.2f}"),
            Curve([phi.low, phi.high], [level, level], place, look=thick),
            Curve([phi.value], [level], place, "", MARKERS[place % len(MARKERS)]),
        ]
    panel = Panel(
        curves,
        "phi: what a loop is worth (1: as much as unshared layers, 0: nothing)",
        "excess of squared residuals over the fit's",
        at=PUBLISHED_PHI,
        at_label=f"published: {PUBLISHED_PHI}",
        limits=(-0.08 * (len(fit.phis) + 1.5), 1.0),
    )
    caption = "Profile of each phi, and its 95 % interval below. Dotted: arXiv 2604.21106, other models and data."
    return Named("phi", caption, draw([panel], 6.4, 4.2))


def residual_figure(fit: LawFit, names: Sequence[str], held: HeldOut | None) -> Named:
    """Plot the loss minus the law's, by run; for held-out runs, minus the prediction of the law of the other sizes."""
    data, fitted = fit.data, fit.data.loss - fit.residuals
    loops = data.loops.astype(int).tolist()
    curves = [
        Curve(
            [x],
            [y],
            loops[n] - 1,
            "",
            MARKERS[data.variant[n] % len(MARKERS)],
            title=f"{names[n]}: loss {x + y:.4f}, law {x:.4f}",
        )
        for n, (x, y) in enumerate(zip(fitted, fit.residuals, strict=True))
    ]
    curves += [Curve(color=r - 1, line="", marker="o", label=plural(r, "loop")) for r in sorted(set(loops))]
    if held is not None:
        look, label = {"markerfacecolor": "none", "markersize": 9}, "the largest size, predicted"
        curves.append(Curve(held.said, held.seen - held.said, "#000000", "", "o", label, look=look))
    caption = "Residuals by run (hover for its name). Circles: runs of the largest size, predicted from the others."
    panel = Panel(curves, "the law's loss", "loss less the law's", level=0, legend=8)
    return Named("residuals", caption, draw([panel], 6.4, 4.2))


def curves_figure(results: Sequence[RunResult]) -> Named:
    """Plot validation loss against tokens, a panel for each size, with a mark where a run ends."""
    shown = [result for result in results if result.curve]
    sizes = list(dict.fromkeys(result.run.labels["size"] for result in shown))[:_MOST_SIZES]
    variants = list(dict.fromkeys(r.run.labels["variant"] for r in shown if r.run.labels["variant"] != ONE_LOOP))
    lines = {name: LINES[place % len(LINES)] for place, name in enumerate(variants)}
    panels: list[Panel] = []
    for size in sizes:
        own = [result for result in shown if result.run.labels["size"] == size]
        curves = [curve for result in own for curve in _learning(result, lines)]
        ends = [loss for result in own for loss in (result.curve[-1][1], result.curve[len(result.curve) // 3][1])]
        if not panels:
            loops = sorted({result.run.config.model.loop_count for result in shown})
            curves += [Curve(color=r - 1, marker=MARKERS[r - 1], label=plural(r, "loop")) for r in loops]
            legend = lines if len(lines) > 1 else {}
            curves += [Curve(color=_GREY, line=line, label=name) for name, line in legend.items()]
        limits = limits_around(ends, 0.1, 0.15)
        panels.append(Panel(curves, TOKENS, "loss (nats per token)", size, limits=limits, legend=8))
    caption = "Validation loss of the runs (hover for a run's name); marks: where they end."
    return Named("curves", caption, draw(panels, 4.6, 3.4, 3))


def _learning(result: RunResult, lines: dict[str, Any]) -> list[Curve]:
    loops, (tokens, losses) = result.run.config.model.loop_count, zip(*result.curve, strict=True)
    title = f"{result.run.name} ({result.status}): {losses[-1]:.4f}"
    line = lines.get(result.run.labels["variant"], "-")
    whole = Curve(tokens, losses, loops - 1, line, title=title, look={"linewidth": 1.2})
    return [whole, Curve(tokens[-1:], losses[-1:], loops - 1, "", MARKERS[loops - 1], look={"markersize": 4})]
