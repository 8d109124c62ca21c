#!/usr/bin/env python3
"""Share of depth's gain: what loops keep, at the end of training, of what twice the layers gain, from sweeps' runs.

    plt sweep configs/sweeps/depth_gain.yaml --jobs 2
    python benchmarks/depth_gain.py runs/sweeps/depth_gain [FOLDER ...] [--plot FILE]

The gain is the validation loss of k layers and one loop minus the run's, with the same seed; its share is of the gain
of 2k layers with the same seeds. Intervals are 95 % of Student's t over seeds. Exit status 1 unless, on every corpus,
2k layers gain 0.05 nats, PLT-2 with a loss for its first loop and in its best form (with that loss, without it, or with
full attention in the last loop alone) 0.04 with an interval above 0.015, and that form keeps 80 % of what a naive loop
gains.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loop_curriculum import Row, finished_rows
from plt_megatron.errors import UserError, run_command
from plt_megatron.experiments.figures import color, new_figure, save
from plt_megatron.experiments.intervals import Interval, estimate
from plt_megatron.experiments.records import load_results
from plt_megatron.run_folder.text import format_table

SHALLOW, DEEP, NAIVE = "k layers", "2k layers", "naive loop x2"
OLD_KEYS = "keys not shifted"  # rows of this name are far below, and not drawn
PLT = ("PLT-2", LOOP_LOSS := "PLT-2 + loop loss", "PLT-2, last loop global")
DEPTH_GAIN, LEAD, LOWEST, KEPT = 0.05, 0.04, 0.015, 0.8


@dataclass
class Corpus:
    """The rows of one sweep, in its order."""

    title: str
    rows: dict[str, Row]

    def gains(self, name: str) -> dict[int, float]:
        """Return seed -> the row's gain over k layers, for the seeds that both have."""
        shallow, losses = self.rows[SHALLOW].losses, self.rows[name].losses
        return {seed: shallow[seed] - losses[seed] for seed in sorted(shallow.keys() & losses.keys())}

    def share(self, name: str, of: str = DEEP) -> Interval:
        """Return the row's gain as a share of the gain of another, over the seeds that both have.

        It is the ratio of the mean gains, which one seed with a small gain cannot blow up; the interval is that of a
        ratio estimator. NaN if there is no such seed, or the other gains nothing.
        """
        whole, part = self.gains(of), self.gains(name)
        seeds = sorted(whole.keys() & part.keys())
        if not seeds or (mean := fmean(whole[seed] for seed in seeds)) <= 0:
            return Interval(math.nan)
        ratio = fmean(part[seed] for seed in seeds) / mean
        off = estimate([(part[seed] - ratio * whole[seed]) / mean for seed in seeds])
        return Interval(ratio, ratio + off.low, ratio + off.high, len(seeds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of a sweep, one for each corpus")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    return run_command(lambda: report(arguments.folders, arguments.plot))


def report(folders: Sequence[Path], plot: Path | None) -> int:
    corpora = [read(folder) for folder in folders]
    missed = []
    for corpus in corpora:
        print(f"{corpus.title}\n{table(corpus)}\n")
        missed += [f"{corpus.title}: {bar}" for bar in missed_bars(corpus)]
    for bar in missed:
        print(f"missed: {bar}")
    if plot is not None:
        _plot(corpora, plot)
        print(plot)
    return 1 if missed else 0


def read(folder: Path) -> Corpus:
    """Return the finished runs of a sweep.

    Raises:
        UserError: `folder` has no sweep, a sweep of several axes, or no finished run of k layers, 2k layers or PLT-2.
    """
    results = load_results(folder)
    rows = finished_rows(results)
    if missing := [name for name in (SHALLOW, DEEP, PLT[0]) if name not in rows]:
        raise UserError(f"{folder}: no finished run of {', '.join(missing)}; the plt sweep command goes on")
    return Corpus(results.plan.title, rows)


def table(corpus: Corpus) -> str:
    """Format the rows: seeds that k layers have too and, over these, training FLOPs, mean loss, gain and its share of
    depth's, with intervals."""
    lines = [
        [
            name,
            str(len(corpus.gains(name))),
            f"{row.flops / corpus.rows[SHALLOW].flops:.2f}",
            f"{fmean(row.losses[seed] for seed in corpus.gains(name)):.4f}",
            _text(estimate(list(corpus.gains(name).values())), "+.4f"),
            _text(corpus.share(name), ".0%"),
        ]
        for name, row in corpus.rows.items()
        if corpus.gains(name)
    ]
    return format_table(lines, header=["row", "seeds", "FLOPs", "loss", "gain", "of 2k layers' gain"])


def missed_bars(corpus: Corpus) -> list[str]:
    """Describe each bar that the corpus misses, with the figures."""
    gains = {name: estimate(list(found.values())) for name in corpus.rows if (found := corpus.gains(name))}
    if lacking := [name for name in (DEEP, PLT[0]) if name not in gains]:
        return [f"{', '.join(lacking)}: no seed of {SHALLOW}"]
    missed = []
    if gains[DEEP].value < DEPTH_GAIN:
        missed.append(f"2k layers gain {gains[DEEP].value:.3f} nats, not {DEPTH_GAIN}")
    best = max((name for name in PLT if name in gains), key=lambda name: gains[name].value)
    for name in dict.fromkeys((LOOP_LOSS, best)):
        if name not in gains:
            missed.append(f"no run of {name}")
        elif not (gains[name].value >= LEAD and gains[name].low > LOWEST):
            missed.append(f"{name} gains {_text(gains[name], '.3f')} nats, not {LEAD} with an interval above {LOWEST}")
    if NAIVE not in gains:
        return [*missed, f"no run of the {NAIVE}, whose gain {best} should keep"]
    kept = corpus.share(best, of=NAIVE)
    if math.isnan(kept.value):
        missed.append("the naive loop gains nothing that could be kept")
    elif kept.value < KEPT:
        missed.append(f"{best} keeps {kept.value:.0%} of the naive loop's gain, not {KEPT:.0%}")
    return missed


def _text(interval: Interval, form: str) -> str:
    if math.isnan(interval.value):
        return ""
    return f"{interval.value:{form}}" + (f" ± {interval.half:{form.lstrip('+')}}" if interval.half is not None else "")


def _plot(corpora: Sequence[Corpus], path: Path) -> None:
    names = [name for name in corpora[0].rows if name not in (SHALLOW, DEEP) and OLD_KEYS not in name]
    figure, panels = new_figure(4.6, 0.9 + 0.34 * len(names), len(corpora), len(corpora))
    for axes, corpus in zip(panels, corpora, strict=True):
        depth = fmean(corpus.gains(DEEP).values())
        axes.axvline(depth, color=color(1), linewidth=1.2)
        axes.axvline(0, color="black", linewidth=0.8)
        for place, name in enumerate(names):
            if name in corpus.rows and (gains := list(corpus.gains(name).values())):
                gain = estimate(gains)
                axes.errorbar(gain.value, place, xerr=gain.half or 0, fmt="o", color=color(0), capsize=3)
                axes.plot(gains, [place] * gain.n, "|", color=color(0))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(corpus.title, fontsize=10)
        axes.set_xlabel("gain over k layers, nats (line: 2k layers)", fontsize=9)
    ranges = [axes.get_xlim() for axes in panels]
    for axes in panels:
        axes.set_xlim(min(low for low, _ in ranges), max(high for _, high in ranges))
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
