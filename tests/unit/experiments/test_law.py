"""The joint law: planted coefficients come back, intervals hold them, and what the runs do not determine is refused."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import Counter

import numpy as np
import pytest

from benchmarks.planted_law import HORIZONS, SIZES, Luck, PlantedLaw, synthetic_study
from plt_megatron.errors import UserError
from plt_megatron.experiments.law import LawFit, equal_phis, fit_law, hold_out_largest, profile
from plt_megatron.experiments.solver import UNIT_D, UNIT_N, Run, evaluate, jacobian, solve, to_arrays

LAW = PlantedLaw()
NO_LUCK = Luck(0.0, 0.0)


def test_without_luck_the_planted_law_comes_back():
    fit = fit_law(synthetic_study(LAW, NO_LUCK, 0), bootstraps=2)
    assert fit.theta == pytest.approx([2.0, 0.9, 0.35, 0.35, 0.4, 0.5, 0.4], rel=1e-6)
    assert fit.coefficients["A"].value == pytest.approx(0.9 * UNIT_N**0.35, rel=1e-5)
    assert fit.coefficients["B"].value == pytest.approx(0.35 * UNIT_D**0.4, rel=1e-5)
    assert fit.rms_residual < 1e-9 and not fit.notes
    asked = Run("naive loop", 0.0, 2e6, 3, 4e6)
    assert fit.fitted([asked])[0] == pytest.approx(LAW.loss(asked), abs=1e-9)


def test_parameters_that_do_not_loop_count_once():
    """A law over models of which half is in no loop, computed here by hand."""
    planted = lambda n, r, d: 1.5 + 0.8 * ((n / 2 + r**0.6 * n / 2) / 1e6) ** -0.3 + 0.4 * (d / 1e7) ** -0.5  # noqa: E731
    made = synthetic_study(PlantedLaw(phis={"PLT": 0.6}), NO_LUCK, 0)
    half = [
        dataclasses.replace(o, once=o.looped / 2, looped=o.looped / 2, loss=planted(o.looped, o.loops, o.tokens))
        for o in made
    ]
    fit = fit_law(half, bootstraps=0)
    assert fit.theta == pytest.approx([1.5, 0.8, 0.4, 0.3, 0.5, 0.6], rel=1e-6)


def test_a_fit_is_the_minimum_and_its_jacobian_right():
    data = to_arrays(synthetic_study(LAW, Luck(), 3), list(LAW.phis))
    found = solve(data, data.loss, np.ones(data.n))

    def cost(theta):
        return float(((evaluate(theta[None], data)[0] - data.loss) ** 2).sum()) / 2

    assert found.cost == pytest.approx(cost(found.theta))
    slopes = jacobian(found.theta, data)
    for index in range(7):
        step = np.zeros(7)
        step[index] = 1e-5
        assert cost(found.theta + 100 * step) > found.cost < cost(found.theta - 100 * step)
        numeric = evaluate((found.theta + step)[None], data) - evaluate((found.theta - step)[None], data)
        assert slopes[:, index] == pytest.approx(numeric[0] / 2e-5, rel=1e-4, abs=1e-7)


def test_no_linear_coefficient_is_negative():
    """Losses that rise with the tokens: B would be negative."""
    rising = [dataclasses.replace(o, loss=2 + (o.tokens / 1e7) ** 0.2) for o in synthetic_study(LAW, Luck(), 0)]
    fit = fit_law(rising, bootstraps=5)
    assert (fit.theta[:3] >= 0).all() and (fit.samples[:, :3] >= 0).all()
    assert any("is 0" in note or "edge" in note for note in fit.notes)


def test_intervals_hold_the_planted_values():
    """A few studies; benchmarks/loop_law.py counts over two hundred."""
    hits: Counter[str] = Counter()
    studies = 8
    for number in range(studies):
        fit = fit_law(synthetic_study(LAW, Luck(), number), bootstraps=60, seed=number)
        hits.update({name: phi in fit.phis[name] for name, phi in LAW.phis.items()})
        hits["E"] += LAW.e in fit.coefficients["E"]
        hits["difference"] += 0.1 in fit.difference("PLT", "naive loop")
        assert fit.phis["PLT"].high - fit.phis["PLT"].low < 0.15  # intervals that hold everything say nothing
    assert min(hits.values()) >= studies - 3 and sum(hits.values()) >= 4 * studies - 6, hits


def test_the_luck_of_a_trunk_is_not_mistaken_for_that_of_its_branches():
    """With the same spread in all, intervals are wider where branches share theirs than where each has its own."""
    made = synthetic_study(LAW, Luck(trunk=0.01, run=0.0), 5)
    shared = fit_law(made, bootstraps=80)
    apart = fit_law([dataclasses.replace(o, block=f"{n}") for n, o in enumerate(made)], bootstraps=80)
    width = lambda fit: fit.phis["PLT"].high - fit.phis["PLT"].low  # noqa: E731
    assert width(shared) > 1.2 * width(apart)


def test_one_run_that_went_wrong_does_not_decide():
    made = synthetic_study(LAW, Luck(0.002, 0.001), 1)
    place = next(n for n, o in enumerate(made) if o.variant == "PLT" and o.loops == 3 and o.looped == SIZES[-1])
    made[place] = dataclasses.replace(made[place], loss=made[place].loss + 0.3)
    fit = fit_law(made, bootstraps=0)
    assert fit.theta[5:] == pytest.approx([0.5, 0.4], abs=0.03)
    assert fit.weights[place] < 0.1 and "far from the law" in " ".join(fit.notes)


def test_are_the_phis_equal():
    different = fit_law(synthetic_study(LAW, Luck(), 2), bootstraps=20)
    assert equal_phis(different, ["PLT", "naive loop"], draws=60) < 0.05
    same = PlantedLaw(phis={"PLT": 0.45, "naive loop": 0.45, "+ CLP": 0.1})
    fit = fit_law(synthetic_study(same, Luck(), 2), bootstraps=20)
    assert equal_phis(fit, ["PLT", "naive loop"], draws=60) > 0.05


def test_the_profile_has_its_minimum_at_the_fit():
    fit = fit_law(synthetic_study(LAW, Luck(), 4), bootstraps=30)
    phi, excess = profile(fit, "PLT", points=9)
    assert phi[4] == pytest.approx(fit.phis["PLT"].value) and abs(excess[4]) < 1e-6
    assert (np.diff(excess[4:]) > 0).all() and (np.diff(excess[:5]) < 0).all()


def test_the_largest_size_is_predicted_from_the_others():
    found = hold_out_largest(fit_law(synthetic_study(LAW, Luck(), 6), bootstraps=5), bootstraps=40)
    assert len(found.seen) == 15 and np.abs(found.seen - found.said).max() < 0.05


def test_the_largest_size_is_held_out_with_the_variants_that_have_a_few_gates_more():
    made = synthetic_study(LAW, Luck(), 6)
    gated = [dataclasses.replace(o, looped=1.02 * o.looped) if o.variant == "PLT" else o for o in made]
    fit = fit_law(gated, bootstraps=2)
    found = hold_out_largest(fit, bootstraps=2)
    assert set(found.seen) == set(fit.data.loss[fit.data.looped >= SIZES[-1]]) and len(found.seen) == 15


def test_the_largest_size_alone_tells_no_loops_worth():
    """Held out, it would leave the phi of a variant that only it has at the value that the search starts from."""
    made = synthetic_study(LAW, Luck(), 6)
    fit = fit_law([o for o in made if o.variant != "naive loop" or o.looped == SIZES[-1]], bootstraps=2)
    with pytest.raises(UserError, match="no finished run of naive loop has several loops"):
        hold_out_largest(fit, bootstraps=2)


def test_far_from_its_runs_the_law_says_so():
    fit = fit_law(synthetic_study(LAW, Luck(), 0), bootstraps=20)
    near = fit.predict(Run("PLT", 0.0, 2e7, 2, 5e7))
    assert near.low < near.value < near.high
    far = Run("PLT", 0.0, 1e9, 2, 2e10)
    with pytest.raises(UserError, match="200 times more parameters than any run has and 2,000 times more tokens"):
        fit.predict(far)
    assert "200 times more parameters" in fit.beyond([far])
    assert "4 loops where runs have at most 3" in fit.beyond([Run("PLT", 0.0, 1e6, 4, 5e6)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loops": (1,)}, "no finished run has several loops"),
        ({"loops": (2, 3)}, "no finished run has one loop"),
        ({"sizes": SIZES[:2]}, "2 sizes; an exponent needs at least 3"),
        ({"horizons": HORIZONS[:1]}, "1 numbers of tokens"),
    ],
)
def test_what_the_runs_do_not_determine_is_refused(changes, said):
    with pytest.raises(UserError, match=f"no law yet: {said}"):
        fit_law(synthetic_study(LAW, Luck(), 0, **changes))


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"looped": 0.0}, {"tokens": -1.0}])
def test_numbers_that_are_none_are_refused(bad):
    made = synthetic_study(LAW, NO_LUCK, 0)
    with pytest.raises(UserError, match="finite losses and positive sizes"):
        fit_law([*made, dataclasses.replace(made[0], **bad)])


@pytest.mark.bench
def test_a_fit_of_a_hundred_runs_takes_seconds():
    made = synthetic_study(LAW, Luck(), 0, seeds=(1, 2))
    started = time.process_time()
    fit_law(made, bootstraps=400)
    assert time.process_time() - started < 10


# ---------------------------------------------------------------- without phi: a sweep's runs of one wiring


fit_curve = functools.partial(fit_law, with_phi=False)
CHINCHILLA = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
WIDE_SIZES = [1e7, 3e7, 1e8, 3e8, 1e9]
BUDGETS = [1e8, 4e8, 2e9, 1e10]


def planted(n: float, d: float) -> float:
    return CHINCHILLA["E"] + CHINCHILLA["A"] / n ** CHINCHILLA["alpha"] + CHINCHILLA["B"] / d ** CHINCHILLA["beta"]


def point(n: float, d: float, loss: float) -> Run:
    return Run("", 0.0, n, 1, d, loss, f"{n}-{d}")


def predict(fit: LawFit, n: float, d: float):
    return fit.predict(Run("", 0.0, n, 1, d))


def points(sizes=WIDE_SIZES, budgets=BUDGETS, noise=0.0, seed=0) -> list[Run]:
    rng = np.random.default_rng(seed)
    return [point(n, d, planted(n, d) + noise * rng.standard_normal()) for n in sizes for d in budgets]


def test_without_noise_the_law_itself_comes_back():
    fit = fit_curve(points(), bootstraps=20)
    for name, value in CHINCHILLA.items():
        assert fit.coefficients[name].value == pytest.approx(value, rel=1e-3)
    assert fit.rms_residual < 1e-6 and not fit.notes
    assert predict(fit, 3e9, 5e10).value == pytest.approx(planted(3e9, 5e10), abs=1e-5)


@pytest.mark.parametrize("repetitions", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_planted_coefficients_lie_within_the_intervals(repetitions):
    """Over many data sets a 95 % interval holds the truth 95 times in 100, give or take 3 standard errors.

    Of nine points each, where the residuals say the least about their own size.
    """
    noise = 0.01
    sizes, budgets = [1e7, 1e8, 1e9], [1e8, 1e9, 1e10]
    hits = dict.fromkeys(CHINCHILLA, 0)
    widths = []
    for seed in range(repetitions):
        fit = fit_curve(points(sizes, budgets, noise=noise, seed=seed), bootstraps=100, seed=seed)
        for name, value in CHINCHILLA.items():
            hits[name] += value in fit.coefficients[name]
        widths.append(fit.coefficients["E"].high - fit.coefficients["E"].low)
        assert fit.rms_residual < 1.5 * noise
    error = math.sqrt(0.95 * 0.05 / repetitions)
    assert min(hits.values()) / repetitions >= 0.95 - 3 * error, hits
    assert np.median(widths) < 60 * noise  # intervals that hold everything say nothing


def test_predictions_have_intervals_that_hold_the_truth():
    hits = 0
    for seed in range(10):
        fit = fit_curve(points(noise=0.005, seed=seed), bootstraps=60, seed=seed)
        hits += planted(3e9, 3e10) in predict(fit, 3e9, 3e10)
    assert hits >= 8


def test_one_size_leaves_its_term_to_e():
    fit = fit_curve(points(sizes=[1e8], budgets=[1e8, 3e8, 1e9, 3e9, 1e10]), bootstraps=50)
    assert set(fit.coefficients) == {"E", "B", "beta"}
    assert fit.coefficients["beta"].value == pytest.approx(CHINCHILLA["beta"], rel=1e-3)
    assert fit.coefficients["E"].value == pytest.approx(
        CHINCHILLA["E"] + CHINCHILLA["A"] / 1e8 ** CHINCHILLA["alpha"], rel=1e-3
    )
    assert "part of E" in fit.notes[0]
    assert predict(fit, 1e8, 3e10).value == pytest.approx(planted(1e8, 3e10), abs=1e-4)
    with pytest.raises(UserError, match="2 times more parameters than any run has"):
        predict(fit, 2e8, 1e9)


def test_budgets_that_hardly_differ_are_one():
    """Runs of equal FLOPs differ by a step of tokens, of which no exponent can be told."""
    fit = fit_curve([point(n, 1e9 * (1 + k / 200), planted(n, 1e9)) for k, n in enumerate(WIDE_SIZES)], bootstraps=10)
    assert set(fit.coefficients) == {"E", "A", "alpha"} and "part of E" in fit.notes[0]
    assert fit.coefficients["alpha"].value == pytest.approx(CHINCHILLA["alpha"], rel=1e-3)


def test_a_fit_is_the_minimum():
    """The fitted law's weighted squared error is below that of any law nearby, and that of the planted one."""
    noisy = points(noise=0.01, seed=3)
    fit = fit_curve(noisy, bootstraps=2)
    values = {name: interval.value for name, interval in fit.coefficients.items()}

    def error(law):
        terms = [(law["A"] / p.looped ** law["alpha"], law["B"] / p.tokens ** law["beta"]) for p in noisy]
        squares = [(p.loss - law["E"] - a - b) ** 2 for p, (a, b) in zip(noisy, terms, strict=True)]
        return float(fit.weights @ squares)

    best = error(values)
    assert best == pytest.approx(float(fit.weights @ fit.residuals**2), rel=1e-6)
    assert best < error(CHINCHILLA)
    for name, value in values.items():
        for factor in (0.999, 1.001):
            assert best < error({**values, name: factor * value})


@pytest.mark.parametrize(
    ("sizes", "budgets", "said"),
    [
        ([1e7], [1e8], "one model size and one token budget"),
        ([1e7, 1e8], [1e8, 1e9, 1e10], "2 model sizes; an exponent needs at least 3"),
        ([1e7, 1e8, 1e9], [1e8, 1e9], "2 token budgets"),
        ([1e7], [1e8, 1e9, 1e10, 1e11], "4 points for 3 coefficients; at least 5 are needed"),
    ],
)
def test_too_few_points_are_refused(sizes, budgets, said):
    with pytest.raises(UserError, match=said):
        fit_curve(points(sizes, budgets))


def test_seeds_alone_determine_no_coefficient():
    """Three sizes, each with its own budget, leave five coefficients open, however many seeds repeat them."""
    few = [
        dataclasses.replace(point(n, 20 * n, 3.0 - k / 10), seed=s)
        for k, n in enumerate((1e7, 1e8, 1e9))
        for s in (1, 2, 3)
    ]
    with pytest.raises(UserError, match="3 models and budgets for 5 coefficients, whatever the seeds"):
        fit_curve(few)


def test_far_extrapolation_is_refused():
    fit = fit_curve(points(noise=0.003), bootstraps=50)
    with pytest.raises(UserError, match="100 times more parameters than any run has"):
        predict(fit, 1e11, 1e10)
    with pytest.raises(UserError, match="tokens"):
        predict(fit, 1e9, 1e6)
    assert predict(fit, 1e10, 1e11).value > CHINCHILLA["E"]


def test_losses_that_follow_no_law_say_so():
    flat = [point(n, d, 3.0) for n in WIDE_SIZES for d in BUDGETS]
    fit = fit_curve(flat, bootstraps=20)
    assert fit.fitted([Run("", 0.0, 1e8, 1, 1e9)])[0] == pytest.approx(3.0, abs=0.02)
    rising = [point(n, d, 2 + 0.1 * math.log(n)) for n in WIDE_SIZES for d in BUDGETS]
    assert fit_curve(rising, bootstraps=20).rms_residual > 0.05
