"""The report's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from plt_megatron.experiments.figures import (
    COLORS,
    LINES,
    MARKERS,
    TOKENS,
    Named,
    add_legend,
    color,
    limit_y,
    new_figure,
    over_tokens,
)
from plt_megatron.experiments.report.rows import LoopLaw, Row, groups

_MOST_GROUPS = 6  # figures of curves at most: nobody looks at more


def make_figures(rows: Sequence[Row], laws: Sequence[LoopLaw]) -> list[Named]:
    """The figures that there is enough data for."""
    made: list[Named] = []
    compared = groups(rows)
    for index, group in enumerate(compared[:_MOST_GROUPS]):
        if not any(row.curve for row in group):
            continue
        suffix, where = (f"_{index + 1}", f"{', '.join(group[0].group)}: ") if len(compared) > 1 else ("", "")
        bars = "Lines: mean over seeds. Marks: the seeds, at the end of their runs."
        caption = f"{where}Validation loss against training tokens. {bars}"
        made.append(Named(f"loss_tokens{suffix}", caption, _curves(group, lambda row: 1.0, TOKENS)))
        caption = f"{where}Validation loss against training FLOPs. {bars}"
        figure = _curves(group, lambda row: row.run.flops_per_token, "training FLOPs")
        made.append(Named(f"loss_flops{suffix}", caption, figure))
        if any(row.decode is not None and row.loss is not None for row in group):
            caption = f"{where}Validation loss (95 % interval) against measured decoding time. Left and low is better."
            made.append(Named(f"loss_latency{suffix}", caption, _latency(group)))
    if len(compared) > 1 and any(row.loss for row in rows):
        caption = "Final validation loss of every row against its training FLOPs."
        made.append(Named("final_losses", caption, _final_losses(rows)))
    fitted = [law for law in laws if law.fit is not None]
    if fitted:
        caption = "Residuals of the scaling laws: loss minus fitted loss. A pattern means that the law does not fit."
        made.append(Named("residuals", caption, _residuals(fitted)))
    return made


def _new(height: float = 4.6) -> tuple[Figure, Axes]:
    figure, (axes,) = new_figure(8, height)
    axes.set_ylabel("validation loss (nats per token)")
    return figure, axes


def _style(index: int) -> tuple[str, str, str]:
    """Color, line and marker of the row at `index`: told apart in grey as well."""
    return color(index), LINES[(index // len(COLORS)) % len(LINES)], MARKERS[index % len(MARKERS)]


def _curves(group: Sequence[Row], scale: Callable[[Row], float], label: str) -> Figure:
    """Mean validation curves; the first, steep part is cut off at the top."""
    figure, axes = _new()
    shown: list[float] = []
    for index, row in enumerate(group):
        curve = row.curve
        if not curve:
            continue
        shade, line, marker = _style(index)
        xs, ys = [tokens * scale(row) for tokens, _ in curve], [loss for _, loss in curve]
        axes.plot(xs, ys, color=shade, linestyle=line, linewidth=1.6, label=_legend(row))
        ends = list(row.losses.values())
        axes.plot([xs[-1]] * len(ends), ends, color=shade, marker=marker, markersize=4.5, linestyle="", alpha=0.8)
        shown += [*ys[len(ys) // 3 :], *ends]
    if label == TOKENS:
        over_tokens(axes)
    else:
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))  # nobody reads prefixes of FLOPs (5E)
    limit_y(axes, shown, 0.06, 0.12)
    add_legend(axes)
    return figure


def _legend(row: Row) -> str:
    return row.label if row.loss is None else f"{row.label}: {row.loss.mean:.3f}"


def _latency(group: Sequence[Row]) -> Figure:
    figure, axes = _new()
    timed = [(index, row.decode, row) for index, row in enumerate(group) if row.decode is not None and row.loss]
    for index, decode, row in timed:
        _losses(axes, index, [(decode.milliseconds, row)], f"{row.label}: {decode.relative:.2f}x")
    axes.set_xlabel("milliseconds per decoded token step")
    axes.set_xlim(0, 1.12 * max(row.decode.milliseconds for row in group if row.decode is not None))
    add_legend(axes)
    return figure


def _final_losses(rows: Sequence[Row]) -> Figure:
    figure, axes = _new()
    for index, label in enumerate(dict.fromkeys(row.label for row in rows)):
        found = [(row.run.total_flops, row) for row in rows if row.label == label and row.loss is not None]
        _losses(axes, index, found, label)
    axes.set_xlabel("training FLOPs")
    axes.set_xscale("log")
    add_legend(axes)
    return figure


def _losses(axes: Axes, index: int, rows: Sequence[tuple[float, Row]], label: str) -> None:
    """Mean losses of rows at their x, with intervals."""
    shade, _, marker = _style(index)
    shown = [(x, row.loss.mean, row.loss.half or 0.0) for x, row in rows if row.loss is not None]
    xs, ys, halves = zip(*shown, strict=True) if shown else ((), (), ())
    axes.errorbar(xs, ys, yerr=halves, color=shade, label=label, marker=marker, markersize=6, capsize=3, linestyle="")


def _residuals(laws: Sequence[LoopLaw]) -> Figure:
    figure, axes = _new(height=3.4)
    for index, law in enumerate(laws):
        assert law.fit is not None
        shade, _, marker = _style(index)
        fitted = law.fit.data.loss - law.fit.residuals
        axes.plot(fitted, law.fit.residuals, color=shade, marker=marker, markersize=6, linestyle="", label=law.label)
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.set_xlabel("fitted loss")
    axes.set_ylabel("residual")
    add_legend(axes)
    return figure
