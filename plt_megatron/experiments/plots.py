"""Plots of runs' records: a panel of curves for every recorded quantity."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from plt_megatron.experiments.figures import LINES, MARKERS, TOKENS, Curve, Panel, as_written, color, draw, save, smooth
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.metrics import RunMetrics
from plt_megatron.run_folder.text import plural

_COLUMNS = 3
_LABEL = 60  # letters in a line of a run's name
_LETTERS = 12  # in an inch of the legend
_HEAD_ROOM = 0.35  # share of the y range for the steep beginning; the rest shows where runs differ


@dataclass(frozen=True)
class _Quantity:
    """A panel's field of the training records. A list has one curve per loop, a mapping one per name."""

    field: str
    title: str
    unit: str
    scale: float = 1.0
    log: bool = False
    smoothed: bool = False


_QUANTITIES = (
    _Quantity("loss", "loss", "nats per token", smoothed=True),
    _Quantity("loss_by_loops", "loss of steps by their number of loops", "nats per token"),
    _Quantity("grad_norm", "gradient norm", "before clipping", log=True, smoothed=True),
    _Quantity("lr", "learning rate", ""),
    _Quantity("tokens_per_second", "speed", "tokens/s"),
    _Quantity("mfu", "model FLOP/s utilization", "% of the peak", scale=100),
    _Quantity("peak_memory_bytes", "peak memory", "GB, largest rank", scale=1e-9),
    _Quantity("gate_mean", "gates", "mean of g"),
    _Quantity("hidden_norm", "hidden states after a loop", "L2 norm, mean over tokens", log=True),
    _Quantity("step_size", "change by a loop", "L2 norm, mean over tokens", log=True),
    _Quantity("expert_load_max", "load of the busiest expert", "relative to an even load, mean over layers"),
    _Quantity("expert_overlap", "experts also chosen by the first loop", "% of a token's", scale=100),
    _Quantity("aux_loss", "load-balancing loss", "without its coefficient"),
    _Quantity("z_loss", "router z-loss", "without its coefficient"),
    _Quantity("head_z_loss", "z-loss of the head", "without its coefficient", smoothed=True),
    _Quantity("dropped_share", "dropped by experts at their capacity", "%", scale=100),
    _Quantity("step_seconds", "where a step's time goes", "s per step", log=True),
    _Quantity("source_epochs", "passes over the sources", "epochs"),
)


def plot_metrics(
    run_dirs: Sequence[str | os.PathLike[str]],
    out_path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    fields: Sequence[str] = (),
) -> None:
    """Draw everything that the runs recorded against training tokens, one panel per quantity, into an image file.

    Runs differ by color, loops and named parts by line style; validation losses are markers, one for each loop count. A
    quantity that no run recorded has no panel.

    Args:
        run_dirs: folders of runs, at least one.
        out_path: the file; its suffix chooses the format (png, svg, pdf).
        labels: names of the runs; None: their folders' names.
        fields: fields of the training records to draw; none: all.

    Raises `UserError` if a run has no metrics, or the file cannot be written.
    """
    runs = [RunFolder(run).trained_metrics() for run in run_dirs]
    labels = [Path(run).name for run in run_dirs] if labels is None else labels
    asked = [quantity for quantity in _QUANTITIES if quantity.field in fields or not fields]
    panels = [panel for quantity in asked if (panel := _panel(quantity, runs)).curves]
    size = (9, 5.4) if len(panels) == 1 else (5, 3.5)
    figure = draw(panels, *size, _COLUMNS)
    handles = [figure.axes[0].plot([], [], color=color(index), linewidth=2)[0] for index in range(len(runs))]
    labels = [fill(label, _LABEL) for label in labels]
    columns = min(4, len(runs), int(_LETTERS * figure.get_figwidth() / (max(map(len, labels)) + 5)) or 1)
    as_written(legend := figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False))
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)
    save(figure, out_path)


def _panel(quantity: _Quantity, runs: Sequence[RunMetrics]) -> Panel:
    styles: dict[str | int, Any] = {}
    curves: list[Curve] = []
    lowest = highest = 0.0
    for index, metrics in enumerate(runs):
        for name, points in _points(quantity, metrics).items():
            place = name - 1 if isinstance(name, int) else len(styles)
            style = styles.setdefault(name, LINES[place % len(LINES)])
            tokens, values = zip(*points, strict=True)
            finite = [value for value in values if math.isfinite(value)]
            lowest, highest = min(lowest, *finite, 0.0), max(highest, *finite, 0.0)
            alone = "." if len(tokens) < 3 else ""  # a line through one point is invisible
            plain = [Curve(tokens, values, index, style, alone)]
            curves += _smoothed(tokens, values, index) if quantity.smoothed else plain
        if quantity.field == "loss":
            curves += _validation(metrics, index)
    for name, style in styles.items():
        label = f"loop {name}" if isinstance(name, int) else name
        if quantity.field != "source_epochs":  # sources keep their names
            label = label.replace("_", " ")
        curves.append(Curve(color="#555555", line=style, label=label))
    limits: tuple[float, float] | None = None
    if quantity.field == "loss":
        limits = _loss_limits(runs)
    elif not quantity.log and quantity.field not in ("loss_by_loops", "lr") and lowest == 0 < highest:
        limits = (0, 1.08 * highest)  # keeps the curve off the frame
    log_y = quantity.log and highest > 0  # a scale that a diverged run's norms, which are no numbers, do not have
    return Panel(curves, TOKENS, quantity.unit, quantity.title, log_y=log_y, limits=limits, legend=8)


def _points(quantity: _Quantity, metrics: RunMetrics) -> dict[str | int, list[tuple[int, float]]]:
    """Return the points (tokens, value) of each curve by name or loop; the curve of a plain number has no name."""
    curves: dict[str | int, list[tuple[int, float]]] = {}
    for record in metrics.train:
        value = record.get(quantity.field)
        named: dict[str | int, Any] = {"": value}
        if isinstance(value, list):
            named = dict(enumerate(value, 1))
        elif isinstance(value, dict):
            named = value
        for name, number in named.items():
            if isinstance(number, int | float):
                curves.setdefault(name, []).append((record["tokens"], number * quantity.scale))
    return curves


def _smoothed(xs: Sequence[int], ys: Sequence[float], shade: int) -> list[Curve]:
    marker = "." if len(xs) < 3 else ""
    faint = Curve(xs, ys, shade, look={"alpha": 0.25, "linewidth": 0.8})
    return [faint, Curve(xs, smooth(ys), shade, marker=marker, look={"linewidth": 1.8})]


def _validation(metrics: RunMetrics, shade: int) -> list[Curve]:
    curves = []
    look = {"markerfacecolor": "white", "markersize": 6, "linewidth": 1}
    for marker, loop_count in zip(MARKERS, metrics.loop_counts(), strict=False):
        points = metrics.validation_at(loop_count)
        label = f"validation, {plural(loop_count, 'loop')}: {points[-1]['loss']:.3f}"
        tokens, losses = [record["tokens"] for record in points], [record["loss"] for record in points]
        curves.append(Curve(tokens, losses, shade, "", marker, label, look=look))
    return curves


def _loss_limits(runs: Sequence[RunMetrics]) -> tuple[float, float] | None:
    """Return limits that show where the runs differ: the steep fall of the first steps is cut off at the top."""
    losses = [record["loss"] for run in runs for record in (*run.train, *run.validation)]
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite or finite[0] == finite[-1]:
        return None
    lowest, usual = finite[0], finite[int(0.9 * (len(finite) - 1))]
    top = min(finite[-1], usual + _HEAD_ROOM / (1 - _HEAD_ROOM) * (usual - lowest))
    margin = 0.04 * (top - lowest)
    return (lowest - margin, top + margin) if top > lowest else None
