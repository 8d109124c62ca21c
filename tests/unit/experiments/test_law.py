"""Scaling laws: planted coefficients come back within the stated intervals, and too few points are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plt_megatron.errors import UserError
from plt_megatron.experiments.law import LawFit, fit_curve
from plt_megatron.experiments.solver import Model, Observation

LAW = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}  # Chinchilla's
SIZES = [1e7, 3e7, 1e8, 3e8, 1e9]
BUDGETS = [1e8, 4e8, 2e9, 1e10]


def planted(n: float, d: float) -> float:
    return LAW["E"] + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]


def run(n: float, d: float, loss: float) -> Observation:
    return Observation("", 0.0, n, 1, d, loss, "")


def at(n: float, d: float) -> Model:
    return Model("", 0.0, n, 1, d)


def predict(fit: LawFit, n: float, d: float):
    return fit.predict(at(n, d)).loss


def points(sizes=SIZES, budgets=BUDGETS, noise=0.0, seed=0) -> list[Observation]:
    rng = np.random.default_rng(seed)
    return [run(n, d, planted(n, d) + noise * rng.standard_normal()) for n in sizes for d in budgets]


def test_without_noise_the_law_itself_comes_back():
    fit = fit_curve(points(), bootstraps=20)
    for name, value in LAW.items():
        assert fit.coefficients[name].value == pytest.approx(value, rel=1e-3)
    assert fit.rms_residual < 1e-6 and not fit.notes
    assert predict(fit, 3e9, 5e10).value == pytest.approx(planted(3e9, 5e10), abs=1e-5)


@pytest.mark.parametrize("repetitions", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_planted_coefficients_lie_within_the_intervals(repetitions):
    """Over many data sets a 95 % interval holds the truth 95 times in 100, give or take 3 standard errors.

    Of nine points each, where the residuals say the least about their own size.
    """
    noise = 0.01
    sizes, budgets = [1e7, 1e8, 1e9], [1e8, 1e9, 1e10]
    hits = dict.fromkeys(LAW, 0)
    widths = []
    for seed in range(repetitions):
        fit = fit_curve(points(sizes, budgets, noise=noise, seed=seed), bootstraps=100, seed=seed)
        for name, value in LAW.items():
            hits[name] += value in fit.coefficients[name]
        widths.append(fit.coefficients["E"].high - fit.coefficients["E"].low)
        assert fit.rms_residual < 1.5 * noise
    error = math.sqrt(0.95 * 0.05 / repetitions)
    assert min(hits.values()) / repetitions >= 0.95 - 3 * error, hits
    assert np.median(widths) < 60 * noise  # intervals that hold everything say nothing


def test_predictions_have_intervals_that_hold_the_truth():
    hits = 0
    for seed in range(20):
        fit = fit_curve(points(noise=0.005, seed=seed), bootstraps=60, seed=seed)
        hits += planted(3e9, 3e10) in predict(fit, 3e9, 3e10)
    assert hits >= 16


def test_one_size_leaves_its_term_to_e():
    fit = fit_curve(points(sizes=[1e8], budgets=[1e8, 3e8, 1e9, 3e9, 1e10]), bootstraps=50)
    assert set(fit.coefficients) == {"E", "B", "beta"}
    assert fit.coefficients["beta"].value == pytest.approx(LAW["beta"], rel=1e-3)
    assert fit.coefficients["E"].value == pytest.approx(LAW["E"] + LAW["A"] / 1e8 ** LAW["alpha"], rel=1e-3)
    assert "part of E" in fit.notes[0]
    assert predict(fit, 1e8, 3e10).value == pytest.approx(planted(1e8, 3e10), abs=1e-4)
    with pytest.raises(UserError, match="2 times more parameters than any run has"):
        predict(fit, 2e8, 1e9)


def test_a_fit_is_the_minimum():
    """The fitted law's squared error is below that of any law nearby, and that of the planted one."""
    noisy = points(noise=0.01, seed=3)
    fit = fit_curve(noisy, bootstraps=2)
    values = {name: interval.value for name, interval in fit.coefficients.items()}

    def error(law):
        terms = [(law["A"] / p.looped ** law["alpha"], law["B"] / p.tokens ** law["beta"]) for p in noisy]
        return sum((p.loss - law["E"] - a - b) ** 2 for p, (a, b) in zip(noisy, terms, strict=True))

    best = error(values)
    assert best == pytest.approx(sum(residual**2 for residual in fit.residuals), rel=1e-6)
    assert best < error(LAW)
    for name, value in values.items():
        for factor in (0.999, 1.001):
            assert best < error({**values, name: factor * value})


@pytest.mark.parametrize(
    ("sizes", "budgets", "said"),
    [
        ([1e7], [1e8], "one model size and one token budget"),
        ([1e7, 1e8], [1e8, 1e9, 1e10], "2 model sizes; an exponent takes at least 3"),
        ([1e7, 1e8, 1e9], [1e8, 1e9], "2 token budgets"),
        ([1e7], [1e8, 1e9, 1e10, 1e11], "4 points for 3 coefficients; it takes 5"),
    ],
)
def test_too_few_points_are_refused(sizes, budgets, said):
    with pytest.raises(UserError, match=said):
        fit_curve(points(sizes, budgets))


def test_far_extrapolation_is_refused():
    fit = fit_curve(points(noise=0.003), bootstraps=50)
    with pytest.raises(UserError, match="100 times more parameters than any run has"):
        predict(fit, 1e11, 1e10)
    with pytest.raises(UserError, match="tokens"):
        predict(fit, 1e9, 1e6)
    assert predict(fit, 1e10, 1e11).value > LAW["E"]


def test_losses_that_follow_no_law_say_so():
    flat = [run(n, d, 3.0) for n in SIZES for d in BUDGETS]
    fit = fit_curve(flat, bootstraps=20)
    assert fit.fitted([at(1e8, 1e9)])[0] == pytest.approx(3.0, abs=0.02)
    rising = [run(n, d, 2 + 0.1 * math.log(n)) for n in SIZES for d in BUDGETS]
    assert fit_curve(rising, bootstraps=20).rms_residual > 0.05


@pytest.mark.parametrize("bad", [run(1e7, 1e8, math.nan), run(0, 1e8, 3.0), run(1e7, -1, 3.0)])
def test_numbers_that_are_none_are_refused(bad):
    with pytest.raises(UserError, match="finite losses"):
        fit_curve([*points(), bad])
