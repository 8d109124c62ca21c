"""Student's t against a printed table, and intervals against hand-made numbers."""

from __future__ import annotations

import math
import random

import pytest

from plt_megatron.experiments.report.statistics import estimate, paired_difference, t_quantile

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
    assert found.mean == 2.0 and found.n == 3
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.excludes_zero() is False and estimate([9.9, 10.0, 10.1]).excludes_zero() is True
    assert estimate([5.0]).half is None and not estimate([5.0]).excludes_zero()


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng = random.Random(5)
    hits = sum(abs(e.mean - 1) <= e.half for e in (estimate([rng.gauss(1, 2) for _ in range(3)]) for _ in range(2000)))
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_differences_are_paired_by_seed():
    """What the seeds share cancels; a seed that only one has counts for neither."""
    found = paired_difference({1: 5.0, 2: 3.0, 3: 9.0, 7: 0.0}, {3: 9.1, 2: 3.1, 1: 5.1})
    assert found.n == 3 and found.mean == pytest.approx(-0.1) and found.half == pytest.approx(0, abs=1e-9)
    assert paired_difference({1: 2.0}, {2: 1.0}) is None
    assert paired_difference({1: 2.0, 2: 4.0}, {2: 1.0}).half is None
