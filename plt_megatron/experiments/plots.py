"""Plots of what runs recorded: their losses, or a page of curves of everything."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from plt_megatron.errors import UserError
from plt_megatron.experiments.figures import (
    LINES,
    MARKERS,
    add_legend,
    color,
    new_figure,
    over_tokens,
    save,
    smooth,
)
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.metrics import RunMetrics
from plt_megatron.run_folder.text import plural

_COLUMNS = 3
_HEAD_ROOM = 0.35  # of the y range is given to the steep beginning; the rest to where runs differ


@dataclass(frozen=True)
class _Panel:
    """One plot: a field of the training records. A list has one curve a loop, a mapping one a name."""

    field: str
    title: str
    unit: str
    scale: float = 1.0
    log: bool = False
    smoothed: bool = False


_PANELS = (
    _Panel("loss", "loss", "nats per token", smoothed=True),
    _Panel("loss_by_loops", "loss of steps by their number of loops", "nats per token"),
    _Panel("grad_norm", "gradient norm", "before clipping", log=True, smoothed=True),
    _Panel("lr", "learning rate", ""),
    _Panel("tokens_per_second", "speed", "tokens/s"),
    _Panel("mfu", "model FLOP/s utilization", "% of the peak", scale=100),
    _Panel("peak_memory_bytes", "peak memory", "GB, largest rank", scale=1e-9),
    _Panel("gate_mean", "gates", "mean, 1 is all window"),
    _Panel("hidden_norm", "hidden states after a loop", "L2 norm, mean over tokens", log=True),
    _Panel("step_size", "change by a loop", "L2 norm, mean over tokens", log=True),
    _Panel("expert_load_max", "load of the busiest expert", "over an even one, mean over layers"),
    _Panel("expert_overlap", "experts that the first loop chose too", "% of a token's", scale=100),
    _Panel("aux_loss", "load-balancing loss", "without its coefficient"),
    _Panel("z_loss", "router z-loss", "without its coefficient"),
    _Panel("head_z_loss", "z-loss of the head", "without its coefficient", smoothed=True),
    _Panel("dropped_share", "dropped by experts at their capacity", "%", scale=100),
    _Panel("step_seconds", "where a step's time goes", "s per step", log=True),
    _Panel("source_epochs", "passes over the sources", "epochs"),
)


def plot_losses(
    run_dirs: Sequence[str | os.PathLike[str]],
    out_path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
) -> None:
    """Draw training and validation loss against tokens, for one or more runs, into an image file.

    One color per run: the training loss of each logged step faint, its running mean solid, the validation
    loss at each loop count as markers. `labels` name the runs; by default their folders' names. The file's
    suffix chooses the format (png, svg, pdf).
    Raises `UserError` if a run has no metrics, or if the file cannot be written.
    """
    labels, runs = _load(run_dirs, labels)
    figure, (axes,) = new_figure(9, 5.4)
    for index, (metrics, label) in enumerate(zip(runs, labels, strict=True)):
        tokens, losses = [r["tokens"] for r in metrics.train], [r["loss"] for r in metrics.train]
        _draw_smoothed(axes, tokens, losses, color(index), label=f"{label}, training")
        _draw_validation(axes, metrics, color(index), prefix=f"{label}, ", linestyle=(0, (2, 2)))
    over_tokens(axes)
    axes.set_ylabel("loss (nats per token)")
    limits = _y_limits(runs)
    if limits is not None:
        axes.set_ylim(*limits)
    add_legend(axes)
    save(figure, out_path)


def plot_metrics(
    run_dirs: Sequence[str | os.PathLike[str]],
    out_path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
) -> None:
    """Draw all that the runs recorded against training tokens, one panel a quantity, into an image file.

    One color a run; loops and named parts are told apart by line style. What no run recorded has no panel. The file's
    suffix chooses the format (png, svg, pdf).

    Raises:
        UserError: a run has no metrics, or the file cannot be written.
    """
    labels, runs = _load(run_dirs, labels)
    panels = [panel for panel in _PANELS if any(_curves(panel, run) for run in runs)]
    figure, plots = new_figure(5, 3.5, len(panels), _COLUMNS)
    for axes, panel in zip(plots, panels, strict=True):
        _draw_panel(axes, panel, runs)
    handles = [plots[0].plot([], [], color=color(index), linewidth=2)[0] for index in range(len(runs))]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    save(figure, out_path)


def _load(
    run_dirs: Sequence[str | os.PathLike[str]], labels: Sequence[str] | None
) -> tuple[Sequence[str], list[RunMetrics]]:
    if not run_dirs:
        raise UserError("no run to plot")
    names = [Path(run).name for run in run_dirs] if labels is None else labels
    return names, [RunFolder(run).trained_metrics() for run in run_dirs]


def _draw_panel(axes: Axes, panel: _Panel, runs: Sequence[RunMetrics]) -> None:
    styles: dict[str, Any] = {}
    for index, metrics in enumerate(runs):
        for name, points in _curves(panel, metrics).items():
            place = int(name.removeprefix("loop ")) - 1 if name.startswith("loop ") else len(styles)
            style = styles.setdefault(name, LINES[place % len(LINES)])
            tokens, values = [point[0] for point in points], [point[1] for point in points]
            if panel.smoothed:
                _draw_smoothed(axes, tokens, values, color(index))
                continue
            marker = "." if len(tokens) < 3 else ""  # a line through one point is invisible
            axes.plot(tokens, values, marker=marker, color=color(index), linestyle=style, linewidth=1.5)
        if panel.field == "loss":
            _draw_validation(axes, metrics, color(index))
    _decorate(axes, panel, styles)


def _curves(panel: _Panel, metrics: RunMetrics) -> dict[str, list[tuple[int, float]]]:
    """Name of each curve -> its (tokens, value); a plain number's curve has no name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in metrics.train:
        value = record.get(panel.field)
        named = {"": value}
        if isinstance(value, list):
            named = {f"loop {loop}": entry for loop, entry in enumerate(value, 1)}
        elif isinstance(value, dict):
            named = value
        for name, number in named.items():
            if isinstance(number, int | float):
                curves.setdefault(name, []).append((record["tokens"], number * panel.scale))
    return curves


def _draw_smoothed(axes: Axes, xs: list[int], ys: list[float], color: str, label: str | None = None) -> None:
    """Each value faint, the running mean solid."""
    marker = "." if len(xs) < 3 else ""
    axes.plot(xs, ys, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(xs, smooth(ys), color=color, linewidth=1.8, marker=marker, label=label)


def _draw_validation(
    axes: Axes, metrics: RunMetrics, color: str, prefix: str = "", linestyle: str | tuple[int, tuple[int, int]] = ""
) -> None:
    for marker, loop_count in zip(MARKERS, metrics.loop_counts(), strict=False):
        points = metrics.validation_at(loop_count)
        axes.plot(
            [record["tokens"] for record in points],
            [record["loss"] for record in points],
            color=color,
            marker=marker,
            markerfacecolor="white",
            markersize=6,
            linewidth=1,
            linestyle=linestyle,
            label=f"{prefix}validation, {plural(loop_count, 'loop')}: {points[-1]['loss']:.3f}",
        )


def _decorate(axes: Axes, panel: _Panel, styles: dict[str, Any]) -> None:
    over_tokens(axes)
    axes.set_title(panel.title, fontsize=11)
    axes.set_ylabel(panel.unit, fontsize=9)
    if panel.log:
        axes.set_yscale("log")
    elif panel.field not in ("loss", "loss_by_loops", "lr"):
        highest = axes.dataLim.y1
        axes.set_ylim(0, 1.08 * highest if math.isfinite(highest) and highest > 0 else None)  # not on the frame
    for name, style in styles.items():
        if name:
            axes.plot([], [], color="#555555", linestyle=style, label=name.replace("_", " "))
    add_legend(axes, size=8)


def _y_limits(runs: Sequence[RunMetrics]) -> tuple[float, float] | None:
    """Limits that show where the runs differ: the steep fall of the first steps is cut off at the top."""
    losses = [record["loss"] for run in runs for record in (*run.train, *run.validation)]
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite or finite[0] == finite[-1]:
        return None
    lowest, usual = finite[0], finite[int(0.9 * (len(finite) - 1))]
    top = min(finite[-1], usual + _HEAD_ROOM / (1 - _HEAD_ROOM) * (usual - lowest))
    margin = 0.04 * (top - lowest)
    return (lowest - margin, top + margin) if top > lowest else None
