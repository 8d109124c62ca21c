"""The figures of a study's report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from plt_megatron.experiments.figures import (
    LINES,
    MARKERS,
    Named,
    add_legend,
    color,
    limit_y,
    new_figure,
    over_tokens,
)
from plt_megatron.experiments.law import LawFit
from plt_megatron.experiments.report.results import RunResult
from plt_megatron.experiments.study.decision import Curve, Frontier
from plt_megatron.experiments.study.grid import ONE_LOOP
from plt_megatron.experiments.study.questions import HeldOut, Profile
from plt_megatron.run_folder.text import plural

PUBLISHED_PHI = 0.46  # arXiv 2604.21106
_LOSS = "loss (nats per token)"
_MOST_SIZES = 6  # panels of learning curves at most


def frontier_figure(frontier: Frontier, variants: Sequence[str], unit: str) -> Named:
    """Loss in `unit` against what is held equal: a color for each number of loops, a line for each variant."""
    target = float(frontier.curves[0].x[len(frontier.curves[0].x) // 2])
    figure, (axes,) = new_figure(8.2, 4.2)
    for curve in frontier.curves:
        style = LINES[variants.index(curve.variant) % len(LINES)] if curve.loops > 1 else "-"
        axes.plot(curve.x, curve.loss, color=color(curve.loops - 1), linestyle=style, label=_wiring(curve))
        if curve.loops == 1 or curve.variant == variants[0]:
            axes.fill_between(curve.x, curve.low, curve.high, color=color(curve.loops - 1), alpha=0.12, linewidth=0)
    axes.axvline(target, color="#666666", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    _limit(axes, frontier.curves, target)
    axes.set_xlabel(frontier.axis)
    axes.set_ylabel(f"expected loss ({unit})")
    add_legend(axes, size=8, beside=True)
    name = f"frontier_{frontier.question.replace(' ', '_').lower()}"
    caption = f"At equal {frontier.question}: the best shape of each. Dotted: where the answer is asked for."
    return Named(name, f"{caption} Bands: 95 % of the law's bootstrap.", figure)


def _limit(axes: Axes, curves: Sequence[Curve], target: float) -> None:
    """Where curves differ, around the target, and as much again for bands: what is far above would flatten them."""
    near = [np.abs(np.log(c.x / target)) < np.log(10) for c in curves]
    values = _finite([c.loss[here] for c, here in zip(curves, near, strict=True)])
    if len(values):
        bands = _finite([rows[here] for c, here in zip(curves, near, strict=True) for rows in (c.loss, c.low, c.high)])
        span = max(float(np.ptp(values)), 1e-3)
        low, high = max(bands.min(), values.min() - span), min(bands.max(), values.max() + span)
        axes.set_ylim(low - 0.1 * span, high + 0.1 * span)


def is_flat(frontier: Frontier) -> bool:
    """Whether every contender's loss is the same all along the axis."""
    curves = [_finite([curve.loss]) for curve in frontier.curves]
    return all(len(values) == 0 or float(np.ptp(values)) < 1e-9 for values in curves)


def _finite(rows: Sequence[np.ndarray]) -> np.ndarray:
    values = np.concatenate(rows)
    return values[np.isfinite(values)]


def _wiring(curve: Curve) -> str:
    return "1 loop" if curve.loops == 1 else f"{curve.variant}, {plural(curve.loops, 'loop')}"


def phi_figure(fit: LawFit, profiles: Sequence[Profile]) -> Named:
    """How much worse the law fits where a phi is held elsewhere, with each phi's interval below."""
    figure, (axes,) = new_figure(6.4, 4.2)
    for place, found in enumerate(profiles):
        shade, interval = color(place), fit.phis[found.variant]
        axes.plot(found.phi, found.excess, color=shade, label=f"{found.variant}: {interval.value:.2f}")
        level = -0.08 * (place + 1)
        axes.plot([interval.low, interval.high], [level, level], color=shade, linewidth=3, solid_capstyle="butt")
        axes.plot([interval.value], [level], color=shade, marker=MARKERS[place], linestyle="")
    axes.axvline(PUBLISHED_PHI, color="#666666", linewidth=0.8, linestyle=":", label=f"published: {PUBLISHED_PHI}")
    axes.set_ylim(-0.08 * (len(profiles) + 1.5), 1.0)
    axes.set_xlabel("phi: what a loop is worth (1: as much as so many layers, 0: nothing)")
    axes.set_ylabel("squared residuals, more than the fit's")
    add_legend(axes)
    caption = "Profile of each phi, and its 95 % interval below. Dotted: arXiv 2604.21106, other models and data."
    return Named("phi", caption, figure)


def residual_figure(fit: LawFit, names: Sequence[str], held: HeldOut | None) -> Named:
    """Loss less the law's, by run. Held-out runs: less what the law of the other sizes says."""
    figure, (axes,) = new_figure(6.4, 4.2)
    fitted, titles = fit.data.loss - fit.residuals, {}
    for row, (x, y) in enumerate(zip(fitted, fit.residuals, strict=True)):
        loops, gid = int(fit.data.loops[row]), f"run{row}"
        titles[gid] = f"{names[row]}: loss {fit.data.loss[row]:.4f}, law {x:.4f}"
        axes.plot([x], [y], color=color(loops - 1), marker=MARKERS[fit.data.variant[row]], markersize=5, gid=gid)
    for loops in sorted({int(count) for count in fit.data.loops}):
        axes.plot([], [], color=color(loops - 1), marker="o", linestyle="", label=plural(loops, "loop"))
    if held is not None:
        axes.plot(
            held.said,
            held.seen - held.said,
            color="#000000",
            marker="o",
            markerfacecolor="none",
            markersize=9,
            linestyle="",
            label=f"{held.what}, predicted",
        )
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.set_xlabel("the law's loss")
    axes.set_ylabel("loss less the law's")
    add_legend(axes, size=8)
    caption = "Residuals by run (hover for its name). Circles: runs of the largest size, predicted from the others."
    return Named("residuals", caption, figure, titles)


def curves_figure(results: Sequence[RunResult]) -> Named:
    """Validation loss against tokens, a panel for each size; a mark where a run ends."""
    shown = [result for result in results if result.curve]
    sizes = list(dict.fromkeys(result.run.labels["size"] for result in shown))[:_MOST_SIZES]
    variants = list(dict.fromkeys(r.run.labels["variant"] for r in shown if r.run.labels["variant"] != ONE_LOOP))
    figure, plots = new_figure(4.6, 3.4, len(sizes), 3)
    titles = {}
    for axes, size in zip(plots, sizes, strict=True):
        ends: list[float] = []
        for place, result in enumerate(shown):
            if result.run.labels["size"] != size:
                continue
            loops, variant, gid = result.run.config.model.loop_count, result.run.labels["variant"], f"curve{place}"
            style = LINES[variants.index(variant) % len(LINES)] if variant in variants else "-"
            tokens, losses = zip(*result.curve, strict=True)
            titles[gid] = f"{result.run.name} ({result.status}): {losses[-1]:.4f}"
            axes.plot(tokens, losses, color=color(loops - 1), linestyle=style, linewidth=1.2, gid=gid)
            axes.plot(tokens[-1:], losses[-1:], color=color(loops - 1), marker=MARKERS[loops - 1], markersize=4)
            ends += [losses[-1], losses[len(losses) // 3]]
        over_tokens(axes)
        limit_y(axes, ends, 0.1, 0.15)
        axes.set_title(size, fontsize=11)
        axes.set_ylabel(_LOSS, fontsize=9)
    for loops in sorted({result.run.config.model.loop_count for result in shown}):
        plots[0].plot([], [], color=color(loops - 1), marker=MARKERS[loops - 1], label=plural(loops, "loop"))
    for place, variant in enumerate(variants if len(variants) > 1 else []):
        plots[0].plot([], [], color="#555555", linestyle=LINES[place % len(LINES)], label=variant)
    add_legend(plots[0], size=8)
    caption = "Validation loss of the runs (hover for a run's name); marks: where they end."
    return Named("curves", caption, figure, titles)
