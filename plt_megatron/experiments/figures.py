"""How all figures look, and how they become files and markup."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import replacing

# Okabe and Ito's palette: told apart by color-blind readers and in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES: tuple[Any, ...] = (
    *("-", "--", "-.", ":"),
    *((0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2, 1, 2, 1, 2))),
)
MARKERS = "os^Dv<>pXP"
TOKENS = "training tokens"
_DPI = 150
_SHORT, _ROW = 3, 0.085  # a legend's entries, and what a row of it takes of a plot's height
_SMOOTHING_WINDOWS = 25  # the smoothed curve averages over a 25th of the run


@dataclass(frozen=True)
class Named:
    """A figure of a page, the stem of its file name and its caption.

    `titles`: gid of an artist -> what hovering over it shows.
    """

    name: str
    caption: str
    figure: Figure
    titles: dict[str, str] = field(default_factory=dict)


def color(index: int) -> str:
    """The color of the run, row or loop at `index`."""
    return COLORS[index % len(COLORS)]


def new_figure(width: float, height: float, count: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `count` plots, each `width` x `height` inches."""
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


def over_tokens(axes: Axes) -> None:
    """Label the x axis: tokens with engineers' prefixes (5M), from zero."""
    axes.set_xlabel(TOKENS)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)


def limit_y(axes: Axes, values: Iterable[float], below: float, above: float) -> None:
    """Show the values that are finite, and so much of their span below and above them."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        span = max(finite) - min(finite) or 0.1
        axes.set_ylim(min(finite) - below * span, max(finite) + above * span)


def add_legend(axes: Axes, size: int = 9, *, beside: bool = False) -> None:
    """Add a legend if any curve has a label: where it covers least, or a long one on room made above the curves.
    `beside`: to the right of the plot, not on it."""
    count = len(axes.get_legend_handles_labels()[0])
    if not count:
        return
    where: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if beside else {}
    if count > _SHORT and not beside:
        where = {"loc": "upper center", "ncols": 2}
        room = _ROW * -(-count // 2)  # of the height
        to_scale = axes.yaxis.get_transform()
        bottom, top = to_scale.transform(axes.get_ylim())
        axes.set_ylim(top=float(to_scale.inverted().transform(bottom + (top - bottom) / (1 - room))))
    axes.legend(frameon=False, fontsize=size, **where)


def smooth(values: Sequence[float]) -> list[float]:
    """A centered running mean; the window shrinks at both ends and leaves out what is not finite."""
    half = max(3, len(values) // _SMOOTHING_WINDOWS) // 2
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = [value for value in values[index - reach : index + reach + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write an image; the path's suffix chooses the format (png, svg, pdf). Its folder is made.

    Raises:
        UserError: it cannot be written, or there is no such format.
    """
    try:
        with replacing(Path(path), "wb") as file:
            figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=_DPI)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {path}: {error}") from error


def svg(named: Named) -> str:
    """An `<svg>` element without anything that a browser would fetch."""
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": named.name}):
        named.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several figures share a page: their ids must not.
    text = re.sub(r'\bid="', f'id="{named.name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{named.name}-", text)
    for gid, title in named.titles.items():
        text = text.replace(
            f'<g id="{named.name}-{gid}">', f'<g id="{named.name}-{gid}"><title>{escape(title)}</title>'
        )
    # As wide as the page, but no wider than drawn: a small figure would have huge letters.
    return re.sub(r'width="([\d.]+pt)" height="[\d.]+pt"', r'style="max-width: \1"', text, count=1)
