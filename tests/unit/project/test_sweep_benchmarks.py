"""Benchmarks of sweeps: best rates of planted parabolas, and shares of planted gains."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import ModuleType

import pytest

from tests.running import ROOT

RATES = [4e-3 * 2 ** (step / 2) for step in range(5)]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
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
