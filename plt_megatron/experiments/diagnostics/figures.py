"""The figures: states, predictions, attention by layer, gates by layer and head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plt_megatron.experiments.diagnostics.diagnose import MEASURES, Diagnosis
from plt_megatron.experiments.figures import MARKERS, Named, add_legend, color, new_figure
from plt_megatron.experiments.intervals import Intervals

_TITLES = {measure.name: measure.title for measure in MEASURES}
_STATES = ("step_size", "update_cosine", "effective_rank", "fixed_point_gap", "loop_map_gap", "offset_cost")
_LENS = ("lens_loss", "lens_rank", "lens_entropy", "lens_kl", "peak_loop")
_UNITS = {
    "update_cosine": "cosine",
    "effective_rank": "dimensions",
    "lens_loss": "nats per token",
    "lens_rank": "rank",
    "lens_entropy": "nats",
    "lens_kl": "nats",
    "peak_loop": "share of tokens",
    "entropy_global": "nats",
    "entropy_local": "nats",
    "kl_global": "nats",
    "kl_local": "nats",
    "head_rank": "heads",
    "head_cosine": "cosine",
}
_WIDTH, _HEIGHT = 3.4, 2.7  # of a plot, inches
_HEAT_COLUMNS = 3
_NUMBERED_CELLS = 96  # heat maps of up to so many cells show their numbers


def make_figures(diagnosis: Diagnosis) -> list[Named]:
    """The figures that the model has numbers for."""
    bars = "Bars: 95 % bootstrap intervals over sequences."
    made = [
        Named("states", f"How far each loop moves the states, and where. L2 norms. {bars}", _grid(diagnosis, _STATES)),
        Named("lens", f"What the model would predict if it stopped after each loop. {bars}", _grid(diagnosis, _LENS)),
    ]
    if "gate_mean" in diagnosis.details:
        lowest, start = (-1.0, 0.0) if diagnosis.gate_activation == "tanh" else (0.0, 0.5)
        caption = f"Mean of the gate g by layer and head: {start:g}, where it began, is white."
        made.append(Named("gates", caption, _gates(diagnosis.details["gate_mean"], lowest)))
    attention = ("entropy_global", "entropy_local", "kl_global", "kl_local")
    caption = f"Attention by layer, mean over heads and tokens. Shaded: {bars[6:]}"
    made.append(Named("attention", caption, _by_layer(diagnosis, attention)))
    caption = f"Diversity of the heads' outputs by layer. Shaded: {bars[6:]}"
    made.append(Named("heads", caption, _by_layer(diagnosis, ("head_rank", "head_cosine"))))
    return made


# ---------------------------------------------------------------- by loop


def _grid(diagnosis: Diagnosis, names: Sequence[str]) -> Figure:
    """Small multiples over loops, bars for what is a share."""
    shown = [name for name in names if name in diagnosis.loops]
    figure, all_axes = new_figure(_WIDTH, _HEIGHT, len(shown), columns=3)
    for axes, name in zip(all_axes, shown, strict=True):
        intervals = diagnosis.loops[name]
        loops = [loop for loop, value in enumerate(intervals.mean) if not math.isnan(value)]
        _draw(axes, name, loops, intervals)
        axes.set_title(_TITLES[name], fontsize=10)
        axes.set_ylabel(_UNITS.get(name, "L2 norm"), fontsize=9)
        axes.set_xlabel("loop", fontsize=9)
        axes.set_xticks(range(loops[0], loops[-1] + 1), ["E" if loop == 0 else str(loop) for loop in loops])
        axes.set_xlim(loops[0] - 0.5, loops[-1] + 0.5)
    return figure


def _draw(axes: Axes, name: str, loops: Sequence[int], intervals: Intervals) -> None:
    means = intervals.mean[loops]
    errors = None
    if not np.isnan(intervals.low[loops]).any():
        errors = np.clip([means - intervals.low[loops], intervals.high[loops] - means], 0, None)
    if name == "peak_loop":
        axes.bar(loops, means, yerr=errors, color=color(4), ecolor="#333333", capsize=4, width=0.6)
        axes.set_ylim(0, 1.05)
        return
    axes.errorbar(loops, means, yerr=errors, color=color(0), marker="o", markersize=5, linewidth=1.4, capsize=4)
    if name == "update_cosine":
        axes.axhline(0, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylim(-1.05, 1.05)
        return
    axes.margins(y=0.25)
    if len(loops) == 1:
        axes.set_ylim(0, 1.3 * float(means[0]) or 1.0)


# ---------------------------------------------------------------- by layer


def _by_layer(diagnosis: Diagnosis, names: Sequence[str]) -> Figure:
    shown = [name for name in names if name in diagnosis.details]
    figure, all_axes = new_figure(_WIDTH, _HEIGHT, len(shown), columns=2)
    for axes, name in zip(all_axes, shown, strict=True):
        intervals = diagnosis.details[name]
        mean, low, high = (_over_heads(values) for values in (intervals.mean, intervals.low, intervals.high))
        layers = np.arange(mean.shape[1])
        for loop in range(1, len(mean)):
            if np.isnan(mean[loop]).all():
                continue
            shade, marker = color(loop - 1), MARKERS[(loop - 1) % len(MARKERS)]
            axes.plot(layers, mean[loop], color=shade, marker=marker, markersize=4.5, label=f"loop {loop}")
            axes.fill_between(layers, low[loop], high[loop], color=shade, alpha=0.18, linewidth=0)
        axes.set_title(_TITLES[name], fontsize=10)
        axes.set_ylabel(_UNITS[name], fontsize=9)
        axes.set_xlabel("layer", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(-0.4, len(layers) - 0.6)
        axes.margins(y=0.15)
        add_legend(axes, size=8)
    return figure


def _over_heads(values: np.ndarray) -> np.ndarray:
    """[L + 1, layers]; the ends of intervals are averaged over heads, which is wider than the interval of the mean."""
    return values if values.ndim == 2 else values.mean(-1)


def _gates(intervals: Intervals, lowest: float) -> Figure:
    """One heat map a loop, layers down, heads across. A gate is between `lowest` and 1."""
    loops = range(2, len(intervals.mean))
    layers, heads = intervals.mean.shape[1:]
    columns = min(_HEAT_COLUMNS, len(loops))
    rows = -(-len(loops) // columns)
    size = (min(max(0.42 * heads, 2.6), 6.0) * columns + 1.2, min(max(0.36 * layers, 1.5), 6.0) * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    found = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in found[len(loops) :]:
        axes.remove()
    for axes, loop in zip(found, loops, strict=False):
        values = intervals.mean[loop]
        mesh = axes.pcolormesh(values, cmap="RdBu_r", vmin=lowest, vmax=1, edgecolors="white", linewidth=0.5)
        if values.size <= _NUMBERED_CELLS:
            for (layer, head), value in np.ndenumerate(values):
                ink = "white" if abs((value - lowest) / (1 - lowest) - 0.5) > 0.33 else "#222222"
                axes.text(
                    head + 0.5,
                    layer + 0.5,
                    f"{value:.2f}".replace("0.", ".", 1),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=ink,
                )
        axes.set_title(f"loop {loop}", fontsize=10)
        axes.set_xlabel("head", fontsize=9)
        axes.set_ylabel("layer", fontsize=9)
        axes.invert_yaxis()
        for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
            every = -(-count // 12)
            axis.set_ticks([index + 0.5 for index in range(0, count, every)], labels=list(range(0, count, every)))
        axes.tick_params(length=0, labelsize=9)
    figure.colorbar(mesh, ax=found[: len(loops)], label="g", shrink=0.9)
    return figure
