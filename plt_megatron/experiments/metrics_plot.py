"""A page of curves of everything runs recorded in their metrics.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from plt_megatron.errors import UserError
from plt_megatron.experiments.figures import COLOURS, MARKERS, save_image, tidy
from plt_megatron.experiments.plots import smooth
from plt_megatron.train.metrics import FILE_NAME, read_metrics

_COLUMNS = 3
_STYLES = ("-", "--", ":", "-.")  # one a loop, or a part of a step


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
    _Panel("grad_norm", "gradient norm", "before clipping", log=True, smoothed=True),
    _Panel("lr", "learning rate", ""),
    _Panel("tokens_per_second", "speed", "tokens/s"),
    _Panel("mfu", "model FLOP/s utilisation", "% of the peak", scale=100),
    _Panel("peak_memory_bytes", "peak memory", "GB, largest rank", scale=1e-9),
    _Panel("gate_mean", "gates", "mean, 1 is all window"),
    _Panel("hidden_norm", "hidden states after a loop", "L2 norm, mean over tokens", log=True),
    _Panel("step_size", "change by a loop", "L2 norm, mean over tokens", log=True),
    _Panel("expert_load_max", "load of the busiest expert", "over an even one, mean over layers"),
    _Panel("expert_overlap", "experts that the first loop chose too", "% of a token's", scale=100),
    _Panel("aux_loss", "load-balancing loss", "without its coefficient"),
    _Panel("z_loss", "router z-loss", "without its coefficient"),
    _Panel("dropped_share", "dropped by experts at their capacity", "%", scale=100),
    _Panel("step_seconds", "where a step's time goes", "s per step", log=True),
    _Panel("source_epochs", "passes over the sources", "epochs"),
)


def plot_metrics(
    run_dirs: Sequence[str | os.PathLike[str]],
    out_path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
) -> None:
    """Draw all that the runs recorded against training tokens, one panel a quantity, into an image file.

    One colour a run; loops and named parts are told apart by line style. What no run recorded has no panel. The file's
    suffix chooses the format (png, svg, pdf).

    Raises:
        UserError: a run has no metrics, or the file cannot be written.
    """
    if not run_dirs:
        raise UserError("no run to plot")
    labels = [Path(run).name for run in run_dirs] if labels is None else labels
    runs = [_load(Path(run)) for run in run_dirs]
    panels = [panel for panel in _PANELS if any(_curves(panel, run) for run in runs)]
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(15, 3.4 * rows + 0.5), dpi=110, layout="constrained")
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, _COLUMNS, index + 1), panel, runs)
    handles = [figure.axes[0].plot([], [], color=_colour(index), linewidth=2)[0] for index in range(len(runs))]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    save_image(figure, out_path)


def _load(folder: Path) -> list[dict[str, Any]]:
    try:
        records = read_metrics(folder)
    except FileNotFoundError:
        raise UserError(f"{folder / FILE_NAME} not found: {folder} is no run that has begun") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / FILE_NAME} holds a line that is not JSON: {error}") from None
    if not any(record["kind"] == "train" for record in records):
        raise UserError(f"{folder / FILE_NAME} holds no training step yet")
    return records


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _draw(axes: Axes, panel: _Panel, runs: Sequence[list[dict[str, Any]]]) -> None:
    styles: dict[str, str] = {}
    for index, records in enumerate(runs):
        curves = _curves(panel, records)
        for name, points in curves.items():
            place = int(name.removeprefix("loop ")) - 1 if name.startswith("loop ") else len(styles)
            style = styles.setdefault(name, _STYLES[place % len(_STYLES)])
            tokens, values = [point[0] for point in points], [point[1] for point in points]
            if panel.smoothed:
                axes.plot(tokens, values, color=_colour(index), alpha=0.25, linewidth=0.7)
                values = smooth(values)
            marker = "." if len(tokens) < 3 else ""  # a line through one point is not seen
            axes.plot(tokens, values, marker=marker, color=_colour(index), linestyle=style, linewidth=1.5)
        if panel.field == "loss":
            _draw_validation(axes, records, _colour(index))
    _decorate(axes, panel, styles)


def _curves(panel: _Panel, records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Name of each curve -> its (tokens, value); a plain number's curve has no name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        value = record.get(panel.field) if record["kind"] == "train" else None
        named = {"": value}
        if isinstance(value, list):
            named = {f"loop {loop}": entry for loop, entry in enumerate(value, 1)}
        elif isinstance(value, dict):
            named = value
        for name, number in named.items():
            if isinstance(number, int | float):
                curves.setdefault(name, []).append((record["tokens"], number * panel.scale))
    return curves


def _draw_validation(axes: Axes, records: list[dict[str, Any]], colour: str) -> None:
    validation = [record for record in records if record["kind"] == "validation"]
    for marker, loop_count in zip(MARKERS, sorted({record["loop_count"] for record in validation}), strict=False):
        points = [(record["tokens"], record["loss"]) for record in validation if record["loop_count"] == loop_count]
        loops = "1 loop" if loop_count == 1 else f"{loop_count} loops"
        label = f"validation, {loops}: {points[-1][1]:.3f}"
        axes.plot(*zip(*points, strict=True), marker, color=colour, markerfacecolor="white", markersize=5, label=label)


def _decorate(axes: Axes, panel: _Panel, styles: dict[str, str]) -> None:
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("training tokens", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=8)
    axes.set_xlim(left=0)
    if panel.log:
        axes.set_yscale("log")
    elif panel.field not in ("loss", "lr"):
        axes.set_ylim(bottom=0)
    tidy(axes)
    for name, style in styles.items():
        if name:
            axes.plot([], [], color="#555555", linestyle=style, label=name.replace("_", " "))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
