"""Plots of runs' losses."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from plt_megatron.errors import UserError
from plt_megatron.experiments.figures import COLOURS, MARKERS, save_image, tidy
from plt_megatron.experiments.run_metrics import RunMetrics, load_run

_SMOOTHING_WINDOWS = 25  # the smoothed curve averages over a 25th of the run
_HEAD_ROOM = 0.35  # of the y range is given to the steep beginning; the rest to where runs differ


def plot_losses(
    run_dirs: Sequence[str | os.PathLike[str]],
    out_path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
) -> None:
    """Draw training and validation loss against tokens, for one or more runs, into an image file.

    One colour per run: the training loss of each logged step faint, its running mean solid, the validation
    loss at each loop count as markers. `labels` name the runs; by default their folders' names. The file's
    suffix chooses the format (png, svg, pdf).
    Raises `UserError` if a run has no metrics, or if the file cannot be written.
    """
    if not run_dirs:
        raise UserError("no run to plot")
    labels = [Path(run).name for run in run_dirs] if labels is None else labels
    runs = [load_run(run) for run in run_dirs]

    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, (metrics, label) in enumerate(zip(runs, labels, strict=True)):
        _draw_run(axes, metrics, label, COLOURS[index % len(COLOURS)])
    _decorate(axes, runs)
    save_image(figure, out_path)


def _draw_run(axes: Axes, metrics: RunMetrics, label: str, colour: str) -> None:
    tokens = [point.tokens for point in metrics.train]
    losses = [point.loss for point in metrics.train]
    axes.plot(tokens, losses, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(losses), color=colour, linewidth=1.8, label=f"{label}, training")
    for index, loop_count in enumerate(metrics.loop_counts()):
        points = [point for point in metrics.validation if point.loop_count == loop_count]
        loops = "1 loop" if loop_count == 1 else f"{loop_count} loops"
        axes.plot(
            [point.tokens for point in points],
            [point.loss for point in points],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markerfacecolor="white",
            markersize=6,
            linewidth=1,
            linestyle=(0, (2, 2)),
            label=f"{label}, validation, {loops}: {points[-1].loss:.3f}",
        )


def smooth(values: Sequence[float]) -> list[float]:
    """A centred running mean; the window shrinks at both ends and leaves out what is not finite."""
    half = max(3, len(values) // _SMOOTHING_WINDOWS) // 2
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = [value for value in values[index - reach : index + reach + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _decorate(axes: Axes, runs: Sequence[RunMetrics]) -> None:
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    limits = _y_limits(runs)
    if limits is not None:
        axes.set_ylim(*limits)
    tidy(axes).legend(frameon=False, fontsize=9)


def _y_limits(runs: Sequence[RunMetrics]) -> tuple[float, float] | None:
    """Limits that show where the runs differ: the steep fall of the first steps is cut off at the top."""
    losses = [point.loss for run in runs for point in run.train]
    losses += [point.loss for run in runs for point in run.validation]
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite or finite[0] == finite[-1]:
        return None
    lowest, usual = finite[0], finite[int(0.9 * (len(finite) - 1))]
    top = min(finite[-1], usual + _HEAD_ROOM / (1 - _HEAD_ROOM) * (usual - lowest))
    margin = 0.04 * (top - lowest)
    return (lowest - margin, top + margin) if top > lowest else None
