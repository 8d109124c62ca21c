"""One style for all figures, and ways to save them."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plt_megatron.errors import UserError

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv<>pXP"


@dataclass(frozen=True)
class Named:
    """A figure, the stem of its file and what stands below it."""

    name: str
    caption: str
    figure: Figure


def tidy(axes: Axes) -> Axes:
    """A light grid behind the data, no frame at the top and right."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(named: Named, folder: Path) -> Path:
    """Write a PNG of 150 dots per inch; returns its path."""
    path = folder / f"{named.name}.png"
    FigureCanvasAgg(named.figure)
    named.figure.savefig(path, dpi=150)
    return path


def save_image(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a file whose suffix chooses the format (png, svg, pdf); `UserError` if it cannot be written."""
    FigureCanvasAgg(figure)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that names no image format
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
    # As wide as the page, but no wider than drawn: a small figure would have huge letters.
    return re.sub(r'width="([\d.]+pt)" height="[\d.]+pt"', r'style="max-width: \1"', text, count=1)
