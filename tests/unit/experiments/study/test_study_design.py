"""The design of a study: what it promises is what fits then show, and its money goes where it tells the most."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.planted_law import HORIZONS, SIZES, Luck, PlantedLaw, synthetic_study
from plt_megatron.experiments.files import NoiseSettings
from plt_megatron.experiments.law import fit_law
from plt_megatron.experiments.study.design import Arm, Horizons, choose_runs, estimated_noise, expected_theta

LAW = PlantedLaw()
THETA = np.array([LAW.e, LAW.a, LAW.b, LAW.alpha, LAW.beta, *LAW.phis.values()])
NAMES = tuple(LAW.phis)
NOISE = NoiseSettings(0.006, 0.003)


def arms(sizes=SIZES, seeds=(1,)) -> list[Arm]:
    """Every combination; a second of training is a billion parameters times tokens times loops."""
    wirings = [("", 1), *((name, count) for name in NAMES for count in (2, 3))]
    return [
        Arm(variant, 0.0, size, count, f"{size:g}", seed, size * count / 1e9)
        for seed in seeds
        for size in sizes
        for variant, count in wirings
    ]


def everything(own: list[Arm]) -> dict[int, tuple[float, ...]]:
    return dict.fromkeys(range(len(own)), HORIZONS)


def test_the_promised_interval_is_the_spread_of_fits():
    """Of forty studies with the design's own noise."""
    own = arms()
    design = choose_runs(own, Horizons(HORIZONS), THETA, NAMES, 0.0, noise=NOISE, done=everything(own))
    assert design.chosen == [] and design.seconds == 0
    found = [fit_law(synthetic_study(LAW, Luck(0.006, 0.003), n), bootstraps=0).theta[5:] for n in range(40)]
    for index, name in enumerate(NAMES):
        assert design.half_width(name) == pytest.approx(1.96 * np.std([row[index] for row in found]), rel=0.4)


def test_horizons_of_an_arm_are_branches_of_one_trunk():
    horizons = Horizons((1.0, 2.0, 4.0), decay_share=0.2)
    assert horizons.new_tokens([], [4.0]) == 4.0
    assert horizons.new_tokens([], [1.0, 2.0, 4.0]) == pytest.approx(4.0 + 0.2 * 2 + 0.2 * 1)
    assert horizons.new_tokens([2.0], [4.0]) == pytest.approx(4.0 - 0.8 * 2)  # goes on from where that began to fall
    assert horizons.new_tokens([4.0], [1.0]) == pytest.approx(0.2)


def test_after_a_first_round_without_a_usable_run_others_are_chosen():
    own, horizons = arms(seeds=(1, 2)), Horizons(HORIZONS, 0.2)
    first = {arm for arm, _ in choose_runs(own, horizons, THETA, NAMES, 4e4, noise=NOISE).chosen}
    again = choose_runs(own, horizons, THETA, NAMES, 4e4, noise=NOISE, closed=first).chosen
    assert first and again and not first & {arm for arm, _ in again}


def test_the_budget_is_kept_and_more_of_it_tells_more():
    own = arms(seeds=(1, 2))
    widths = []
    for seconds in (1e5, 3e5, 1e6):
        design = choose_runs(own, Horizons(HORIZONS), THETA, NAMES, seconds, noise=NOISE)
        assert 0.5 * seconds < design.seconds <= seconds
        assert len(set(design.chosen)) == len(design.chosen)
        widths.append(design.half_width("PLT"))
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.9 * widths[0]
    assert f"phi of PLT within ±{widths[-1]:.2g}" in design.in_words()


def test_the_chosen_runs_determine_the_law_better_than_as_many_seconds_of_anything():
    """Against random arms at the same price; and a law can be fitted to what the chosen runs say."""
    own, rng = arms(seeds=(1, 2)), np.random.default_rng(0)
    horizons, budget = Horizons(HORIZONS), 2e5
    design = choose_runs(own, horizons, THETA, NAMES, budget, noise=NOISE)
    others = []
    for _ in range(20):
        held, left = {}, budget
        for index in rng.permutation(len(own)):
            price = horizons.new_tokens([], HORIZONS) * own[index].seconds_per_token
            if price <= left:
                held[int(index)], left = HORIZONS, left - price
        done = choose_runs(own, horizons, THETA, NAMES, 0.0, noise=NOISE, done=held)
        others.append(done.half_width("PLT") + done.half_width("naive loop"))
    assert design.half_width("PLT") + design.half_width("naive loop") < min(others)
    runs = {(own[index].variant, own[index].looped, own[index].loops, own[index].seed, d) for index, d in design.chosen}
    made = synthetic_study(LAW, Luck(), 0, seeds=(1, 2))
    seen = [o for o in made if (o.variant, o.looped, o.loops, o.seed, o.tokens) in runs]
    assert len(seen) == len(design.chosen)
    assert fit_law(seen, bootstraps=0).theta[5:] == pytest.approx(THETA[5:], abs=0.15)


def test_runs_that_are_there_are_not_chosen_again_and_a_contrast_draws_the_next_ones():
    own = arms()
    first = choose_runs(own, Horizons(HORIZONS), THETA, NAMES, 1e5, noise=NOISE)
    done: dict[int, list[float]] = {}
    for index, tokens in first.chosen:
        done.setdefault(index, []).append(tokens)
    about_naive = np.eye(7)[6:] - np.eye(7)[5:6]
    after = choose_runs(own, Horizons(HORIZONS), THETA, NAMES, 1e5, noise=NOISE, done=done, contrasts=about_naive)
    assert not set(first.chosen) & set(after.chosen)
    assert after.half_width("naive loop") < first.half_width("naive loop")


def test_the_noise_that_residuals_show():
    fit = fit_law(synthetic_study(LAW, Luck(0.01, 0.002), 3, seeds=(1, 2)), bootstraps=0)
    found = estimated_noise(fit)
    assert found.trunk == pytest.approx(0.01, rel=0.5) and found.run == pytest.approx(0.002, rel=0.5)
    quiet = synthetic_study(LAW, Luck(0.0, 0.004), 3, seeds=(1, 2))
    assert estimated_noise(fit_law(quiet, bootstraps=0)).trunk < 0.004


def test_the_law_to_plan_with_fits_any_scale():
    for scale in (1.0, 1e3):
        theta = expected_theta([s * scale for s in SIZES], [h * scale for h in HORIZONS], 2)
        n, d = np.exp(np.mean(np.log(SIZES))) * scale, np.exp(np.mean(np.log(HORIZONS))) * scale
        middle = theta[0] + theta[1] * (n / 1e6) ** -theta[3] + theta[2] * (d / 1e7) ** -theta[4]
        assert middle == pytest.approx(1.7 + 0.7 + 0.7)


def test_a_hundred_runs_are_planned_in_seconds():
    own = arms(sizes=tuple(np.geomspace(3e5, 5e6, 6)), seeds=(1, 2, 3))
    started = time.process_time()
    design = choose_runs(own, Horizons(HORIZONS), THETA, NAMES, 1e6, noise=NOISE)
    assert len(design.chosen) >= 100
    assert time.process_time() - started < 10
