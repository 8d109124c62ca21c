"""The joint law: planted coefficients come back, intervals hold them, and what the runs do not determine is refused."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter

import numpy as np
import pytest

from plt_megatron.errors import UserError
from plt_megatron.experiments.law import fit_law
from plt_megatron.experiments.solver import UNIT_D, UNIT_N, Model, evaluate, jacobian, solve, to_arrays
from plt_megatron.experiments.study.questions import equal_phis, hold_out_largest, profile
from plt_megatron.experiments.study.synthetic import HORIZONS, SIZES, Luck, PlantedLaw, synthetic_study

LAW = PlantedLaw()
NO_LUCK = Luck(0.0, 0.0)


def test_without_luck_the_planted_law_comes_back():
    fit = fit_law(synthetic_study(LAW, NO_LUCK, 0), bootstraps=0)
    assert fit.theta == pytest.approx([2.0, 0.9, 0.35, 0.35, 0.4, 0.5, 0.4], rel=1e-6)
    assert fit.rms_residual < 1e-9 and not fit.notes
    asked = Model("naive loop", 0.0, 2e6, 3, 4e6)
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
    groups = np.arange(2)
    found = solve(data, groups, data.loss, np.ones(data.n))

    def cost(theta):
        return float(((evaluate(theta[None], data, groups)[0] - data.loss) ** 2).sum()) / 2

    assert found.cost == pytest.approx(cost(found.theta))
    slopes = jacobian(found.theta, data, groups)
    for index in range(7):
        step = np.zeros(7)
        step[index] = 1e-5
        assert cost(found.theta + 100 * step) > found.cost < cost(found.theta - 100 * step)
        numeric = evaluate((found.theta + step)[None], data, groups) - evaluate(
            (found.theta - step)[None], data, groups
        )
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
    assert equal_phis(different, ["PLT", "naive loop"], draws=60).p < 0.05
    same = PlantedLaw(phis={"PLT": 0.45, "naive loop": 0.45, "+ CLP": 0.1})
    fit = fit_law(synthetic_study(same, Luck(), 2), bootstraps=20)
    found = equal_phis(fit, ["PLT", "naive loop"], draws=60)
    assert found.p > 0.05 and "not told apart" in found.text
    with pytest.raises(UserError, match="no phi of PLT-9"):
        equal_phis(fit, ["PLT", "PLT-9"])


def test_the_profile_has_its_minimum_at_the_fit():
    fit = fit_law(synthetic_study(LAW, Luck(), 4), bootstraps=30)
    found = profile(fit, "PLT", points=9)
    assert found.phi[4] == pytest.approx(fit.phis["PLT"].value) and abs(found.excess[4]) < 1e-6
    assert (np.diff(found.excess[4:]) > 0).all() and (np.diff(found.excess[:5]) < 0).all()


def test_the_largest_size_is_predicted_from_the_others():
    found = hold_out_largest(fit_law(synthetic_study(LAW, Luck(), 6), bootstraps=5), bootstraps=40)
    assert len(found.rows) == 15 and np.abs(found.seen - found.said).max() < 0.05


def test_the_largest_size_is_held_out_with_the_variants_that_have_a_few_gates_more():
    made = synthetic_study(LAW, Luck(), 6)
    gated = [dataclasses.replace(o, looped=1.02 * o.looped) if o.variant == "PLT" else o for o in made]
    fit = fit_law(gated, bootstraps=2)
    found = hold_out_largest(fit, bootstraps=2)
    assert (fit.data.looped[found.rows] >= SIZES[-1]).all() and len(found.rows) == 15


def test_far_from_its_runs_the_law_says_so():
    fit = fit_law(synthetic_study(LAW, Luck(), 0), bootstraps=20)
    near = fit.predict(Model("PLT", 0.0, 2e7, 2, 5e7))
    assert not near.beyond and near.loss.low < near.loss.value < near.loss.high
    far = Model("PLT", 0.0, 1e9, 2, 2e10)
    with pytest.raises(UserError, match="200 times more parameters than any run has and 2,000 times more tokens"):
        fit.predict(far)
    assert "200 times more parameters" in fit.predict(far, far=True).beyond
    assert "4 loops where runs have at most 3" in fit.beyond([Model("PLT", 0.0, 1e6, 4, 5e6)])
    with pytest.raises(UserError, match="no phi for PLT-9"):
        fit.fitted([Model("PLT-9", 0.0, 1e6, 2, 5e6)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loops": (1,)}, "no finished run has several loops"),
        ({"loops": (2, 3)}, "no finished run has one loop"),
        ({"sizes": SIZES[:2]}, "2 sizes; an exponent takes at least 3"),
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


def test_units_do_not_matter():
    fit = fit_law(synthetic_study(LAW, NO_LUCK, 0), bootstraps=2)
    assert fit.coefficients["A"].value == pytest.approx(0.9 * UNIT_N**0.35, rel=1e-5)
    assert fit.coefficients["B"].value == pytest.approx(0.35 * UNIT_D**0.4, rel=1e-5)


@pytest.mark.bench
def test_a_fit_of_a_hundred_runs_takes_seconds():
    made = synthetic_study(LAW, Luck(), 0, seeds=(1, 2))
    started = time.process_time()
    fit_law(made, bootstraps=400)
    assert time.process_time() - started < 10
