"""Student's t against a printed table, intervals against hand-made numbers, and how often they hold the truth."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from plt_megatron.experiments import intervals as module
from plt_megatron.experiments.intervals import Bootstrap, Interval, estimate, paired_difference, t_quantile

# Probability, degrees of freedom, and the quantile as tables print it.
TABLE = [
    (0.975, 1, 12.7062),
    (0.975, 2, 4.3027),
    (0.975, 3, 3.1824),
    (0.975, 9, 2.2622),
    (0.975, 120, 1.9799),
    (0.95, 2, 2.9200),
    (0.995, 4, 4.6041),
    (0.9995, 5, 6.8688),
    (0.5, 7, 0.0),
]


@pytest.mark.parametrize(("probability", "degrees", "value"), TABLE)
def test_quantiles_are_those_of_the_table(probability, degrees, value):
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=6e-5)


def test_one_degree_is_cauchy():
    for probability in (0.6, 0.9, 0.999):
        assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-9)


def test_mean_and_interval():
    found = estimate([1.0, 2.0, 3.0])
    assert found.value == 2.0 and found.n == 3
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.sign == 0 and estimate([9.9, 10.0, 10.1]).sign == 1
    assert estimate([5.0]).half is None and estimate([5.0]).sign == 0


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng = random.Random(5)
    hits = sum(1 in e for e in (estimate([rng.gauss(1, 2) for _ in range(3)]) for _ in range(2000)))
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_differences_are_paired_by_seed():
    """What the seeds share cancels; a seed that only one has counts for neither."""
    found = paired_difference({1: 5.0, 2: 3.0, 3: 9.0, 7: 0.0}, {3: 9.1, 2: 3.1, 1: 5.1})
    assert found.n == 3 and found.value == pytest.approx(-0.1) and found.half == pytest.approx(0, abs=1e-9)
    assert paired_difference({1: 2.0}, {2: 1.0}) is None
    assert paired_difference({1: 2.0, 2: 4.0}, {2: 1.0}).half is None


@pytest.mark.parametrize(
    ("low", "high", "sign", "text"),
    [(0.1, 0.3, 1, "+0.2 [+0.1, +0.3]"), (-0.3, -0.1, -1, "-0.2 [-0.3, -0.1]"), (-0.1, 0.1, 0, "+0.0 [-0.1, +0.1]")],
)
def test_an_interval_has_a_sign_where_it_leaves_zero_out(low, high, sign, text):
    found = Interval((low + high) / 2, low, high)
    assert found.sign == sign and found.text("+.1f") == text and found.is_known
    assert low in found and high + 0.01 not in found


def test_what_is_not_known_has_no_sign():
    alone, nothing = Interval(3.0, math.nan, math.nan), Interval(math.nan, math.nan, math.nan)
    assert (alone.sign, alone.text(".1f"), alone.is_known) == (0, "3.0", False)
    assert (nothing.sign, nothing.text(".1f")) == (0, "")


# ---------------------------------------------------------------- over sequences


def test_equal_values_have_no_width():
    found = Bootstrap(6, 0).intervals(np.full((6, 2), 0.1))
    np.testing.assert_allclose(found.mean, [0.1, 0.1])
    np.testing.assert_array_equal(found.low, found.high)


def test_one_sequence_has_no_interval():
    found = Bootstrap(1, 0).intervals(np.array([[3.0]]))
    assert found.mean[0] == 3 and np.isnan(found.low[0]) and np.isnan(found.high[0])


def test_a_sequence_without_a_value_does_not_count():
    values = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [3.0, 5.0]])
    found = Bootstrap(4, 0).intervals(values)
    np.testing.assert_array_equal(found.mean, [2.0, 5.0])
    own = estimate([1.0, 2.0, 3.0])
    assert (found.low[0], found.high[0]) == pytest.approx((own.low, own.high))
    assert np.isnan(found.low[1]), "a single value"
    nothing = Bootstrap(4, 0).intervals(np.full((4, 1), np.nan))
    assert np.isnan(nothing.mean[0])


@pytest.mark.parametrize("sequences", [2, 3, 6, 40])
def test_they_cover_the_mean_as_often_as_they_say(sequences):
    """1,500 experiments at once, as columns: 95 % of the intervals contain the true mean, with few sequences too (the
    plain percentile interval: 86 % of six, 50 % of two)."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(sequences, 1500))
    found = Bootstrap(sequences, 2).intervals(values)
    assert 0.935 < ((found.low <= 3) & (found.high >= 3)).mean() < 0.97


@pytest.mark.parametrize(("sequences", "defined"), [(16, 2), (64, 3), (64, 7), (64, 8), (64, 20)])
def test_they_do_so_where_few_sequences_have_a_value(sequences, defined):
    rng = np.random.default_rng(5)
    values = rng.normal(3.0, 2.0, size=(sequences, 1500))
    values[rng.random(values.shape).argsort(0) >= defined] = np.nan
    found = Bootstrap(sequences, 2).intervals(values)
    assert 0.93 < ((found.low <= 3) & (found.high >= 3)).mean() < 0.97


def test_differences_are_paired():
    """Sequences differ much more than the loops do within each: the difference is known all the same."""
    rng = np.random.default_rng(3)
    level = rng.normal(0, 10, size=(12, 1))
    values = np.concatenate([level, level + 1 + rng.normal(0, 0.01, size=(12, 1))], 1)
    bootstrap = Bootstrap(12, 0)
    apart, change = bootstrap.intervals(values), bootstrap.intervals(np.diff(values, axis=1))
    assert apart.high[0] - apart.low[0] > 5 and apart.high[0] > apart.low[1]
    assert 0.98 < change.low[0] < change.high[0] < 1.02


def test_the_seed_decides_and_columns_do_not_matter(monkeypatch):
    values = np.random.default_rng(4).normal(size=(9, 5, 3))
    first, again, other = (Bootstrap(9, seed).intervals(values) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.low, again.low)
    assert (first.low != other.low).any()
    monkeypatch.setattr(module, "_COLUMNS", 4)
    np.testing.assert_allclose(Bootstrap(9, 1).intervals(values).high, first.high)
    assert first.at(4, 2) == Interval(first.mean[4, 2], first.low[4, 2], first.high[4, 2])
