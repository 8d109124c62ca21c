#!/usr/bin/env python3
"""Coverage of the loop law's 95 % intervals, measured on synthetic studies of a planted law.

    python benchmarks/loop_law.py --studies 200

Each study has five sizes, one to three loops, two variants, three horizons, and noise of runs and seeds; the law and
its intervals are fitted to it as in a report. Exit status 1 if an interval holds the truth in fewer than 90 or more
than 99 of 100 studies. Minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.planted_law import Luck, PlantedLaw, synthetic_study
from plt_megatron.experiments.law import fit_law
from plt_megatron.experiments.solver import Run
from plt_megatron.run_folder.text import format_table

TARGET = (0.90, 0.99)
FARTHER = Run("PLT", 0.0, 1e7, 2, 3e7)  # twice the largest size, three times the longest horizon


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200, metavar="N")
    parser.add_argument("--bootstraps", type=int, default=200, metavar="N")
    arguments = parser.parse_args()
    rows, failed = [], False
    for name, luck, seeds in (("one seed", Luck(), (1,)), ("two seeds", Luck(seed=0.004), (1, 2))):
        hits = coverage(PlantedLaw(), luck, seeds, arguments.studies, arguments.bootstraps)
        for quantity, share in hits.items():
            is_missed = not TARGET[0] <= share <= TARGET[1]
            failed |= is_missed
            rows.append([name, quantity, f"{share:.1%}", "missed" if is_missed else ""])
    print(format_table(rows, header=["study", "quantity", "holds the truth", ""]))
    return int(failed)


def coverage(law: PlantedLaw, luck: Luck, seeds: tuple[int, ...], studies: int, bootstraps: int) -> dict[str, float]:
    """Return for each quantity the share of studies whose interval contains its true value."""
    hits: Counter[str] = Counter()
    truth = {"E": law.e, "alpha": law.alpha, "beta": law.beta}
    names = list(law.phis)
    for number in range(studies):
        fit = fit_law(synthetic_study(law, luck, number, seeds=seeds), bootstraps=bootstraps, seed=number)
        coefficients = fit.coefficients
        hits.update({name: value in coefficients[name] for name, value in truth.items()})
        hits.update({f"phi of {name}": phi in fit.phis[name] for name, phi in law.phis.items()})
        hits["difference of phis"] += law.phis[names[0]] - law.phis[names[1]] in fit.difference(*names)
        hits["loss farther out"] += law.loss(FARTHER) in fit.predict(FARTHER)
    return {name: count / studies for name, count in hits.items()}


if __name__ == "__main__":
    sys.exit(main())
