"""Draw all figures in one style: panels of curves are data, drawn here and saved as files or markup."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.ticker import EngFormatter, FuncFormatter

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import replacing

# Okabe and Ito's palette, which color-blind readers can tell apart, also in grey, then five of Paul Tol's.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"),
    *("#882255", "#999933", "#88CCEE", "#661100", "#AAAAAA"),
)
LINES: tuple[Any, ...] = (
    *("-", "--", "-.", ":"),
    *((0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2, 1, 2, 1, 2))),
)
MARKERS = "os^Dv<>pXP"
TOKENS, FLOPS = "training tokens", "training FLOPs"  # labels of x axes with number formats of their own
_DPI = 150
_LABELS = 10  # font size
_SHORT, _ROW = 3, 0.085  # entries of a short legend, and share of a plot's height that a row of a longer one takes
_TALLEST = 20  # entries in a column beside a plot
_SMOOTHING_WINDOWS = 25  # the smoothed curve averages over a 25th of the run


@dataclass(frozen=True)
class Curve:
    """A series of points in a panel.

    Attributes:
        color: index into the palette, or the name of a color.
        line: matplotlib's line style; empty: markers only.
        label: entry in the legend; a curve without points has only that.
        band: lower and upper ends [2, n] of the area shaded around it.
        bars: lengths of error bars down and up [2, n], or both ways [n].
        title: tooltip.
        look: further arguments of matplotlib's `plot`.
    """

    x: Sequence[float] | np.ndarray = ()
    y: Sequence[float] | np.ndarray = ()
    color: int | str = 0
    line: Any = "-"
    marker: str = ""
    label: str = ""
    band: Any = None
    bars: Any = None
    title: str = ""
    look: dict[str, Any] = field(default_factory=dict)

    @property
    def shade(self) -> str:
        return self.color if isinstance(self.color, str) else color(self.color)


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
        x, y: labels of the axes; `TOKENS` and `FLOPS` have number formats of their own.
        level, at: positions of a horizontal and a vertical line.
        limits, x_limits: ranges of y and x; None: as the curves require.
        ticks: labels by position along x.
        legend: font size of the legend; `beside`: to the right of the panel, not on it.
    """

    curves: Sequence[Curve]
    x: str = ""
    y: str = ""
    title: str = ""
    log_x: bool = False
    log_y: bool = False
    level: float | None = None
    at: float | None = None
    at_label: str = ""
    limits: tuple[float | None, float | None] | None = None
    x_limits: tuple[float, float] | None = None
    ticks: dict[float, str] | None = None
    margin: float | None = None
    legend: int = 9
    beside: bool = False


@dataclass(frozen=True)
class Named:
    """A figure of a page, the stem of its file name and its caption."""

    name: str
    caption: str
    figure: Figure


def color(index: int) -> str:
    """Return the color of the run, row or loop at `index`."""
    return COLORS[index % len(COLORS)]


def line(index: int) -> Any:
    """Return the line style of the row at `index`: another one each time that the colors begin again."""
    return LINES[(index // len(COLORS)) % len(LINES)]


def draw(panels: Sequence[Panel], width: float, height: float, columns: int = 1) -> Figure:
    """Draw a figure of panels, each `width` x `height` inches."""
    figure, plots = new_figure(width, height, len(panels), columns)
    for axes, panel in zip(plots, panels, strict=True):
        for curve in panel.curves:
            _draw(axes, curve)
        _finish(axes, panel)
    return figure


def _draw(axes: Axes, curve: Curve) -> None:
    options = {"color": curve.shade, "linestyle": curve.line, "marker": curve.marker, "label": curve.label or None}
    if curve.bars is not None:
        axes.errorbar(curve.x, curve.y, yerr=curve.bars, **({"capsize": 3} | options | curve.look))
        return
    # matplotlib knows no tooltips: `svg` makes them of such ids.
    gid = f"title:{curve.title}" if curve.title else None
    axes.plot(curve.x, curve.y, gid=gid, **({"linewidth": 1.5} | options | curve.look))
    if curve.band is not None:
        axes.fill_between(curve.x, *curve.band, color=curve.shade, alpha=0.15, linewidth=0)


def _finish(axes: Axes, panel: Panel) -> None:
    """Apply everything in a panel but the curves."""
    axes.set_title(panel.title, fontsize=_LABELS)
    axes.set_ylabel(panel.y, fontsize=_LABELS)
    axes.set_xlabel(panel.x, fontsize=_LABELS)
    if panel.log_x:
        axes.set_xscale("log")
    elif panel.x == TOKENS:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 5M
        axes.set_xlim(left=0)
    elif panel.x == FLOPS:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))  # nobody reads prefixes of FLOPs (5E)
    if panel.log_y:
        axes.set_yscale("log")
    if panel.margin is not None:
        axes.margins(y=panel.margin)
    if panel.x_limits is not None:
        axes.set_xlim(*panel.x_limits)
    if panel.ticks is not None:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        axes.minorticks_off()
    if panel.level is not None:
        axes.axhline(panel.level, color="#666666", linewidth=0.8)
    if panel.at is not None:
        axes.axvline(panel.at, color="#666666", linewidth=0.8, linestyle=":", label=panel.at_label or None)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    add_legend(axes, panel.legend, beside=panel.beside)


def limits_around(values: Iterable[float], below: float, above: float) -> tuple[float, float] | None:
    """Return limits that keep finite values in view, with margins as shares of their span; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    span = max(finite) - min(finite) or 0.1
    return min(finite) - below * span, max(finite) + above * span


def new_figure(width: float, height: float, count: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Create a figure of `count` plots, each `width` x `height` inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    layout = ConstrainedLayoutEngine(hspace=0.08)  # else a title touches the label of the plot above
    figure = Figure(figsize=(width * columns, height * rows), layout=layout)
    plots = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in plots[count:]:
        axes.remove()
    for axes in plots[:count]:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, plots[:count]


def add_legend(axes: Axes, size: int = 9, *, beside: bool = False) -> None:
    """Add a legend if any curve has a label: where it covers least, or if it is long, in room made above the curves.
    `beside`, or if it would take more than half of the height: to the right of the plot, not on it."""
    labels = axes.get_legend_handles_labels()[1]
    count = len(labels)
    if not count:
        return
    # As many as fit beside one another; the layout makes plots wider than they are now.
    letters = 1.15 * axes.bbox.width / axes.figure.dpi * 72 / (0.62 * size)
    columns = 2 if 2 * (max(map(len, labels)) + 7) <= letters else 1
    room = _ROW * -(-count // columns)  # share of the height
    where: dict[str, Any] = {}
    if beside or room > 0.5:
        where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "ncols": -(-count // _TALLEST)}
    elif count > _SHORT:
        where = {"loc": "upper center", "ncols": columns}
        to_scale = axes.yaxis.get_transform()
        bottom, top = to_scale.transform(axes.get_ylim())
        axes.set_ylim(top=float(to_scale.inverted().transform(bottom + (top - bottom) / (1 - room))))
    as_written(axes.legend(facecolor="white", edgecolor="none", framealpha=0.85, fontsize=size, **where))


def as_written(legend: Legend) -> None:
    """Show each `$` of a label: names of runs are no formulas."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def smooth(values: Sequence[float]) -> list[float]:
    """Return a centered running mean; the window shrinks at both ends and leaves out values that are not finite."""
    half = max(3, len(values) // _SMOOTHING_WINDOWS) // 2
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = [value for value in values[index - reach : index + reach + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write an image; the path's suffix chooses the format (png, svg, pdf). Its folder is created.

    Raises `UserError` if it cannot be written, or there is no such format.
    """
    try:
        with replacing(Path(path), "wb") as file:
            figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=_DPI)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {path}: {error}") from error


def svg(named: Named) -> str:
    """Return a figure as an `<svg>` element without anything that a browser would fetch."""
    stream = io.StringIO()
    # Letters as text can be searched and read aloud, and take half the bytes of outlines.
    with rc_context({"svg.hashsalt": named.name, "svg.fonttype": "none"}):
        named.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", text)
    # Coordinates to hundredths of a point; what is between tags is read.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    # Figures on one page must not share ids.
    text = re.sub(r'\bid="', f'id="{named.name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{named.name}-", text)
    # As wide as the page, but no wider than drawn: a small figure would have huge letters.
    return re.sub(r'width="([\d.]+pt)" height="[\d.]+pt"', r'style="max-width: \1"', text, count=1)
