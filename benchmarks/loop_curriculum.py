#!/usr/bin/env python3
"""Loop curriculum: share of a second loop's gain that remains if it is switched on late, from a sweep's runs.

    plt sweep configs/sweeps/curriculum.yaml --jobs 2
    python benchmarks/loop_curriculum.py runs/sweeps/curriculum [--plot FILE]

The gain is the validation loss of one loop minus the run's, with the same seed; its share is of the gain of two
loops in every step. Time is in training FLOPs. Exit status 1 if two loops in every step gain nothing: shares would mean
nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plt_megatron.errors import UserError, run_command
from plt_megatron.experiments.figures import add_legend, color, new_figure, save
from plt_megatron.experiments.records import SweepResults, load_results
from plt_megatron.run_folder.text import format_table

NONE, ALL = "one loop", "all"
# arXiv 2609.03807, a second stream with shared weights: (training time, share of the gain).
PUBLISHED = {"last 25 %": (1.14, 0.71), "last 57.5 %": (1.33, 0.94)}


@dataclass
class Row:
    """Runs of one row of a sweep: training FLOPs, and validation loss in nats per token by seed."""

    flops: float = 0.0
    losses: dict[int, float] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    return run_command(lambda: report(arguments.folder, arguments.plot))


def report(folder: Path, plot: Path | None) -> int:
    rows = read(folder)
    shares = {name: share(row, rows) for name, row in rows.items()}
    table = [
        [
            name,
            f"{row.flops / rows[NONE].flops:.2f}",
            f"{fmean(row.losses.values()):.4f}",
            f"{fmean(gains(row, rows)):+.4f}",
            f"{shares[name]:.0%}",
            ", ".join(f"{gain:+.4f}" for gain in gains(row, rows)),
        ]
        for name, row in rows.items()
    ]
    print(format_table(table, header=["two loops in", "FLOPs", "loss", "gain", "share of it", "gain by seed"]))
    if plot is not None:
        _plot(rows, shares, plot)
        print(plot)
    return 0 if fmean(gains(rows[ALL], rows)) > 0 else 1


def read(folder: Path) -> dict[str, Row]:
    """Return the runs by schedule, in the sweep's order.

    Raises:
        UserError: the sweep is another one, a run is missing or has failed, or there are no runs of a schedule that the
            others are compared with.
    """
    results = load_results(folder)
    rows = finished_rows(results)
    for result in results.runs:
        if result.loss is None:
            raise UserError(f"{result.run.name}: {result.reason}; the same plt sweep command goes on")
    if missing := {NONE, ALL} - rows.keys():
        raise UserError(f"{folder}: no runs of {' and '.join(sorted(missing))}; run configs/sweeps/curriculum.yaml")
    return rows


def finished_rows(results: SweepResults) -> dict[str, Row]:
    """Return the rows of a sweep with one axis by name, in its order, without runs that have no result.

    Raises:
        UserError: the sweep has other axes.
    """
    check_axes(results)
    rows: dict[str, Row] = defaultdict(Row)
    for result in results.runs:
        if result.loss is not None:
            (name,) = result.run.labels.values()
            rows[name].flops = result.run.total_flops
            rows[name].losses[result.run.seed] = result.loss
    return dict(rows)


def check_axes(results: SweepResults, *expected: str) -> None:
    """Raise `UserError` unless the sweep has these axes; none given: unless it has one."""
    axes = dict.fromkeys(axis for run in results.plan.runs for axis in run.labels)
    if not axes.keys() >= set(expected) or (not expected and len(axes) != 1):
        needed = ", ".join(expected) or "a single one"
        raise UserError(f"{results.plan.folder}: another sweep; its axes are {', '.join(axes)}, not {needed}")


def gains(row: Row, rows: dict[str, Row]) -> list[float]:
    """Return the gain over one loop of each seed."""
    return [rows[NONE].losses[seed] - loss for seed, loss in row.losses.items()]


def share(row: Row, rows: dict[str, Row]) -> float:
    """Return the row's share of the gain of two loops in every step; gains are means over the seeds."""
    return fmean(gains(row, rows)) / fmean(gains(rows[ALL], rows))


def _plot(rows: dict[str, Row], shares: dict[str, float], path: Path) -> None:
    figure, (axes,) = new_figure(5.6, 4.2)
    times = [row.flops / rows[NONE].flops for row in rows.values()]
    axes.plot(times, list(shares.values()), "o-", color=color(0), label="PLT, measured here")
    for name, time, value in zip(rows, times, shares.values(), strict=True):
        axes.annotate(name, (time, value), textcoords="offset points", xytext=(6, -10), fontsize=8)
    for name, (time, value) in PUBLISHED.items():
        label = "published: a second stream, arXiv 2609.03807" if name == next(iter(PUBLISHED)) else None
        axes.plot([time], [value], "^", color=color(1), label=label)
        axes.annotate(name, (time, value), textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.set_xlabel("training time relative to one loop (PLT: FLOPs)")
    axes.set_ylabel("share of the second loop's gain")
    add_legend(axes)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
