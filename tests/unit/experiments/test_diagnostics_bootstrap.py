"""Intervals: what they contain, how often, and what has none."""

from __future__ import annotations

import numpy as np
import pytest

from plt_megatron.experiments.diagnostics import bootstrap as module
from plt_megatron.experiments.diagnostics.bootstrap import Bootstrap, normal_tail


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
    assert 1 <= found.low[0] < 2 < found.high[0] <= 3
    assert np.isnan(found.low[1]), "a single value"
    nothing = Bootstrap(4, 0).intervals(np.full((4, 1), np.nan))
    assert np.isnan(nothing.mean[0])


@pytest.mark.parametrize(("sequences", "least"), [(6, 0.91), (40, 0.935)])
def test_they_cover_the_mean_as_often_as_they_say(sequences, least):
    """1,500 experiments at once, as columns: 95 % of the intervals contain the true mean, a few less with few sequences
    (the plain percentile interval: 86 % of six)."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(sequences, 1500))
    found = Bootstrap(sequences, 2).intervals(values)
    covered = ((found.low <= 3) & (found.high >= 3)).mean()
    assert least < covered < 0.97


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
    assert first.at(4, 2) == (first.mean[4, 2], first.low[4, 2], first.high[4, 2])


def test_the_normal_distributions_tail():
    assert normal_tail(0) == 0.5 and normal_tail(1.959964) == pytest.approx(0.025, rel=1e-5)
