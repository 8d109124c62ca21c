#!/usr/bin/env python3
"""Learning rate transfer: compare the best rate of each width, depth and loop count, from a sweep's runs.

    plt sweep configs/sweeps/learning_rate_transfer.yaml --jobs 2
    python benchmarks/learning_rate_transfer.py runs/sweeps/learning_rate_transfer [--plot FILE]

A model's best rate is the minimum of the parabola, in the rate's logarithm, through its best run and the two
neighbours. Exit status 1 if the best rates of `recommended` differ by more than a factor of the square root of two, or
if one is at an end of the rates tried.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loop_curriculum import check_axes
from plt_megatron.errors import UserError, run_command
from plt_megatron.experiments.figures import LINES, MARKERS, add_legend, color, new_figure, save
from plt_megatron.experiments.records import load_results
from plt_megatron.run_folder.text import format_table

STEP = math.sqrt(2)
Losses = dict[float, float]  # by learning rate
Cells = dict[tuple[str, str], Losses]  # by model and loops


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    return run_command(lambda: report(arguments.folder, arguments.plot))


def report(folder: Path, plot: Path | None) -> int:
    forms = read(folder)
    is_met = True
    for form, cells in forms.items():
        best = {cell: best_rate(losses) for cell, losses in cells.items()}
        print(f"{form}: best learning rate, and the loss that is lost at the rate that is best for all\n")
        print(_table(cells, best))
        spread = _spread(best.values())
        at_end = any(is_at_end(losses) for losses in cells.values())
        more = ", or more: some are at an end of the rates tried" if at_end else ""
        print(f"\nlargest / smallest: {spread:.2f}{more}")
        print(f"over the loops of one model: at most {_spread_over_loops(best):.2f}")
        tried = [min(losses, key=losses.__getitem__) for losses in cells.values()]
        print(f"the best of the rates tried: {min(tried):.2e} to {max(tried):.2e}, {_spread(tried):.2f}\n")
        is_met &= form != "recommended" or (spread <= STEP and not at_end)
    if plot is not None:
        _plot(forms, plot)
        print(plot)
    print(f"recommended: the best rate is {'' if is_met else 'not '}the same within one step of {STEP:.2f}")
    return 0 if is_met else 1


def read(folder: Path) -> dict[str, Cells]:
    """Return losses by form, averaged over a model's seeds; a diverged run's loss is infinite.

    Leave out rates that fewer seeds have tried than others, since seeds differ by more than neighbouring rates.

    Raises:
        UserError: the sweep is another one, or a run is missing or failed otherwise.
    """
    by_seed: dict[tuple[str, str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    results = load_results(folder)
    check_axes(results, "form", "model", "loops")
    for result in results.runs:
        labels = result.run.labels
        if result.status not in ("used", "diverged"):
            raise UserError(f"{result.run.name}: {result.reason}; the same plt sweep command goes on")
        rates = by_seed[labels["form"], labels["model"], labels["loops"]]
        rates[result.run.config.optimizer.lr].append(math.inf if result.loss is None else result.loss)
    forms: dict[str, Cells] = defaultdict(dict)
    for (form, model, loops), rates in by_seed.items():
        forms[form][model, loops] = means(rates)
    return forms


def means(losses: Mapping[float, Sequence[float]]) -> Losses:
    """Return the mean loss of each rate that the largest number of seeds has tried."""
    seeds = max(map(len, losses.values()))
    return {rate: fmean(own) for rate, own in losses.items() if len(own) == seeds}


def best_rate(losses: Losses) -> float:
    """Return the rate at the parabola's minimum, or the best run's if it is at an end or beside a diverged run."""
    rates = sorted(losses)
    place = rates.index(min(rates, key=losses.__getitem__))
    if place in (0, len(rates) - 1):
        return rates[place]
    below, here, above = (losses[rate] for rate in rates[place - 1 : place + 2])
    if not math.isfinite(below + above):
        return rates[place]
    left, right = (math.log(rates[place] / rates[place - 1]), math.log(rates[place + 1] / rates[place]))
    down, up = (here - below) / left, (above - here) / right
    curvature = (up - down) / (left + right)
    return rates[place] * math.exp(-(down * right + up * left) / (left + right) / (2 * curvature))


def is_at_end(losses: Losses) -> bool:
    best = min(losses, key=losses.__getitem__)
    return best in (min(losses), max(losses))


def _spread_over_loops(best: dict[tuple[str, str], float]) -> float:
    """Return the largest ratio, over models, of the best rates of a model's loop counts."""
    by_model: dict[str, list[float]] = defaultdict(list)
    for (model, _), rate in best.items():
        by_model[model].append(rate)
    return max(map(_spread, by_model.values()))


def _spread(rates: Collection[float]) -> float:
    return max(rates) / min(rates)


def _table(cells: Cells, best: dict[tuple[str, str], float]) -> str:
    rates = sorted(next(iter(cells.values())))
    common = min(rates, key=lambda rate: sum(losses[rate] - min(losses.values()) for losses in cells.values()))
    rows = [
        [
            ", ".join(cell),
            f"{best[cell]:.2e}",
            f"{losses[common] - min(losses.values()):.3f}",
            *(f"{losses[rate]:.3f}" for rate in rates),
        ]
        for cell, losses in cells.items()
    ]
    return format_table(rows, header=["", "best", f"at {common:.2e}", *(f"{rate:.2e}" for rate in rates)])


def _plot(forms: dict[str, Cells], path: Path) -> None:
    """Draw a panel per form: loss above each model's best, by rate."""
    figure, panels = new_figure(5.4, 4.2, len(forms), len(forms))
    for axes, (form, cells) in zip(panels, forms.items(), strict=True):
        models = list(dict.fromkeys(model for model, _ in cells))
        for (model, loops), losses in cells.items():
            rates = sorted(losses)
            over = [losses[rate] - min(losses.values()) for rate in rates]
            axes.plot(rates, over, color=color(int(loops[0]) - 1), **_line(models.index(model)))
        axes.set_xscale("log", base=2)
        axes.set_xticks(rates, [f"{rate * 1e3:.3g}" for rate in rates])
        axes.set_ylim(-0.01, 0.4)
        axes.set_xlabel("learning rate / 0.001")
        axes.set_title(form)
    for loops in dict.fromkeys(loops for _, loops in cells):
        axes.plot([], [], color=color(int(loops[0]) - 1), label=loops)
    for place, model in enumerate(models):
        axes.plot([], [], color="0.4", label=model, **_line(place))
    add_legend(axes, beside=True)
    panels[0].set_ylabel("validation loss over the model's best (nats per token)")
    save(figure, path)


def _line(place: int) -> dict[str, Any]:
    """Return the line style of a model."""
    return {"linestyle": LINES[place % len(LINES)], "marker": MARKERS[place], "markersize": 4}


if __name__ == "__main__":
    sys.exit(main())
