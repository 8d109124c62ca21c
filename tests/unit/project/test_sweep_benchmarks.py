"""Benchmarks of sweeps: best rates of planted parabolas, and shares of planted gains."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import ModuleType

import pytest

from tests.running import ROOT

RATES = [4e-3 * 2 ** (step / 2) for step in range(5)]


def load(name: str, folder: str = "benchmarks") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def parabola(best: float) -> dict[float, float]:
    return {rate: 3.0 + 0.2 * math.log(rate / best) ** 2 for rate in RATES}


@pytest.mark.parametrize("best", [6e-3, 8e-3, 9.1e-3])
def test_a_parabolas_lowest_point_is_found_between_the_rates(best):
    rates = load("learning_rate_transfer")
    assert rates.best_rate(parabola(best)) == pytest.approx(best, rel=1e-9)
    assert not rates.is_at_end(parabola(best))


def test_a_best_rate_at_an_end_or_beside_a_diverged_run_is_the_runs_own():
    rates = load("learning_rate_transfer")
    assert rates.best_rate(parabola(1e-3)) == RATES[0] and rates.is_at_end(parabola(1e-3))
    assert rates.best_rate(parabola(8e-3) | {RATES[3]: math.inf}) == RATES[2]


def test_a_rate_that_some_seeds_lack_is_left_out():
    """Its mean would be lower by the seed alone."""
    rates = load("learning_rate_transfer")
    losses = {4e-3: [3.0], 5.66e-3: [3.1, 3.3], 8e-3: [3.2, 3.3]}
    assert rates.means(losses) == pytest.approx({5.66e-3: 3.2, 8e-3: 3.25})


def test_shares_are_of_the_gain_of_two_loops_in_every_step():
    curriculum = load("loop_curriculum")
    rows = {
        "one loop": curriculum.Row(1.0, {1: 3.0, 2: 3.1}),
        "last 50 %": curriculum.Row(1.5, {1: 2.95, 2: 3.03}),
        "all": curriculum.Row(2.0, {1: 2.9, 2: 2.96}),
    }
    assert curriculum.gains(rows["all"], rows) == pytest.approx([0.1, 0.14])
    assert curriculum.share(rows["last 50 %"], rows) == pytest.approx(0.5)
    assert curriculum.share(rows["one loop"], rows) == 0


def test_shares_of_depths_gain_are_paired_by_seed_and_bars_name_what_is_missed():
    depth = load("depth_gain")
    losses = {
        "k layers": {1: 3.0, 2: 3.1, 3: 3.2},
        "2k layers": {1: 2.9, 2: 2.9},
        "naive loop x2": {1: 2.9, 2: 3.0, 3: 3.1},
        "PLT-2": {1: 2.95, 2: 3.05, 3: 3.15},
        "PLT-2 + loop loss": {1: 2.955, 2: 3.055, 3: 3.155},
    }
    corpus = depth.Corpus("planted", {name: depth.Row(1.0, row) for name, row in losses.items()})
    assert list(corpus.gains("2k layers")) == [1, 2]
    share = corpus.share("PLT-2")
    assert (share.value, share.n) == (pytest.approx((0.05 + 0.05) / (0.1 + 0.2)), 2) and share.low < 1 / 3 < share.high
    (missed,) = depth.missed_bars(corpus)
    assert "PLT-2 keeps 50%" in missed
    corpus.rows["PLT-2, last loop global"] = depth.Row(1.0, {1: 2.91, 2: 3.01, 3: 3.11})
    assert depth.missed_bars(corpus) == []
    del corpus.rows["PLT-2, last loop global"]
    corpus.rows["PLT-2"].losses = {1: 2.97, 2: 3.07, 3: 3.18}
    corpus.rows["PLT-2 + loop loss"].losses = {1: 2.98, 2: 3.08, 3: 3.18}
    corpus.rows["2k layers"].losses = {1: 2.96, 2: 3.06}
    deep, loss, lead, _ = depth.missed_bars(corpus)
    assert "2k layers gain 0.040 nats" in deep and "PLT-2 gains 0.027 ± 0.014 nats" in lead
    assert "PLT-2 + loop loss gains 0.020" in loss
    corpus.rows["PLT-2"].losses[4] = 9.0  # which k layers lack
    (row,) = [line.split() for line in depth.table(corpus).splitlines() if line.startswith("PLT-2  ")]
    assert row[1:5] == ["3", "1.00", "3.0733", "+0.0267"]
    corpus.rows["naive loop x2"].losses = {3: 3.3}
    assert "naive loop gains nothing" in depth.missed_bars(corpus)[-1]
    del corpus.rows["naive loop x2"]
    assert "no run of the naive loop x2" in depth.missed_bars(corpus)[-1]
    corpus.rows["2k layers"].losses = {4: 2.9}
    (missed,) = depth.missed_bars(corpus)
    assert "2k layers" in missed
