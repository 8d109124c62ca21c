"""Confidence intervals of all reports.

Runs with seeds: a mean with Student's t interval, and differences paired by seed. Sequences of one model: the bootstrap
of a mean, with the same resamples for all quantities. A law: the block bootstrap of its runs' losses under other noise.
Blocks are runs that share a part of their training, and runs with the same seed. Sizes, loops and tokens stay as they
are (they were chosen, not drawn); the residuals of a block are multiplied by one random factor (the wild cluster
bootstrap, Cameron, Gelbach and Miller 2008, with Webb's six factors). Before that, each block's residuals are corrected
for its leverage on the fit (Bell and McCaffrey 2002): a law of eight coefficients through two dozen blocks makes
residuals smaller than the noise that they stand for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from plt_megatron.experiments.solver import Arrays

LEVEL = 0.95
RESAMPLES = 2000
FEW = 8  # sequences
_COLUMNS = 4096  # columns bootstrapped at once, to bound memory
_FACTORS = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])
_SMALLEST = 0.05  # least eigenvalue of I - H_gg: a block that alone determines a coefficient has no residual


@dataclass(frozen=True)
class Interval:
    """A value and its interval; NaN ends mean no interval. `n`: number of values it is the mean of; 0: not a mean."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.low)

    @property
    def half(self) -> float | None:
        """Half its width; None without an interval."""
        return (self.high - self.low) / 2 if self.is_known else None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on one side of zero, else 0 (undecided)."""
        return (self.low > 0) - (self.high < 0)

    def text(self, form: str) -> str:
        """Format as `1.23 [1.20, 1.26]`; empty if the value is NaN, the value alone without an interval."""
        if math.isnan(self.value):
            return ""
        ends = f" [{self.low:{form}}, {self.high:{form}}]" if self.is_known else ""
        return f"{self.value:{form}}{ends}"


# ---------------------------------------------------------------- over seeds


def estimate(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return mean and t interval of at least one finite value; a single value has no interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, n=1)
    half = t_quantile((1 + level) / 2, n - 1) * statistics.stdev(values, mean) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], level: float = LEVEL
) -> Interval | None:
    """Estimate `values` minus `reference` over the seeds both have; None if there is none."""
    common = sorted(values.keys() & reference.keys())
    return estimate([values[seed] - reference[seed] for seed in common], level) if common else None


def t_quantile(probability: float, degrees: int) -> float:
    """Return the value that Student's t with `degrees` of freedom stays below with `probability`."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def stretch(degrees: int) -> float:
    """Return Student's t quantile over the normal one: how much wider few residuals make an interval."""
    probability = (1 + LEVEL) / 2
    return t_quantile(probability, degrees) / NormalDist().inv_cdf(probability)


# ---------------------------------------------------------------- over sequences


@dataclass(frozen=True)
class Intervals:
    """Means of quantities of one shape, and their 95 % intervals (`Bootstrap`). NaN: not defined.

    `low` and `high` are NaN where there are fewer than two sequences.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at(self, *index: int) -> Interval:
        return Interval(float(self.mean[index]), float(self.low[index]), float(self.high[index]))


class Bootstrap:
    """The same resamples of n sequences for every quantity, so that differences are paired.

    The interval is the percentile interval, widened for small n (Hesterberg 2015, "expanded percentile"): the plain one
    is too narrow by sqrt((n - 1) / n) and by the normal's tails in place of Student's. Of fewer than `FEW` values,
    whose resampled means reach no further than the values do, it is Student's t.
    """

    def __init__(self, sequences: int, seed: int) -> None:
        self.sequences = sequences
        rng = np.random.default_rng(seed)
        self._counts = rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES).astype(np.float64)

    def intervals(self, values: np.ndarray) -> Intervals:
        """Return the intervals of the means of values [n, ...], float64. A mean leaves out sequences that are NaN."""
        assert len(values) == self.sequences
        flat = values.reshape(len(values), -1)
        parts = [self._columns(flat[:, first : first + _COLUMNS]) for first in range(0, flat.shape[1], _COLUMNS)]
        mean, low, high = (np.concatenate(pieces).reshape(values.shape[1:]) for pieces in zip(*parts, strict=True))
        return Intervals(mean, low, high)

    def _columns(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        defined = ~np.isnan(values)
        number = defined.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(defined, values, 0.0).sum(0) / number
            # Relative to the mean, so that equal values give an interval without rounding errors.
            centered = np.where(defined, values - mean, 0.0)
            resampled = (self._counts @ centered) / (self._counts @ defined.astype(np.float64))
            exact = mean + centered.sum(0) / number
            errors = np.sqrt((np.where(defined, values - exact, 0.0) ** 2).sum(0) / (number - 1) / number)
        bounds = np.full((2, values.shape[1]), math.nan)
        for n in np.unique(number[number > 1]):
            of_n = number == n
            if n < FEW:
                half = t_quantile((1 + LEVEL) / 2, n - 1) * errors[of_n]
                bounds[:, of_n] = exact[of_n] - half, exact[of_n] + half
            else:
                bounds[:, of_n] = mean[of_n] + np.nanquantile(resampled[:, of_n], _expanded(n), axis=0)
        return mean, bounds[0], bounds[1]


def _expanded(n: int) -> tuple[float, float]:
    """Return the quantiles of resampled means of n values at which the expanded percentile interval ends."""
    wider = math.sqrt(n / (n - 1)) * t_quantile((1 + LEVEL) / 2, n - 1)
    tail = math.erfc(wider / math.sqrt(2)) / 2  # how often a standard normal variable exceeds it
    return tail, 1 - tail


# ---------------------------------------------------------------- of a law


def adjusted_residuals(residuals: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, data: Arrays) -> np.ndarray:
    """Return residuals [n] rescaled to the size of the underlying errors: (I - H_gg)^-1 times each block's (CR3).

    Args:
        jacobian: [n, p], derivatives of the losses by all coefficients.
    """
    from scipy.linalg import orth

    roots = np.sqrt(weights)
    orthogonal = orth(roots[:, None] * jacobian, rcond=1e-10)  # a coefficient at its bound adds no column
    adjusted = np.empty_like(residuals)
    for block in range(data.blocks.max() + 1):
        rows = np.flatnonzero(data.blocks == block)
        own = orthogonal[rows]
        values, vectors = np.linalg.eigh(np.eye(len(rows)) - own @ own.T)
        root = vectors / np.maximum(values, _SMALLEST) @ vectors.T
        adjusted[rows] = root @ (roots[rows] * residuals[rows]) / roots[rows]
    return adjusted


def draw_errors(adjusted: np.ndarray, data: Arrays, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw errors [count, n]: the part common to all runs of a seed, and each block's own, by independent factors."""
    seeds = data.seeds.max() + 1
    means = np.zeros(seeds)
    if seeds > 1:
        sums, counts = np.bincount(data.seeds, adjusted), np.bincount(data.seeds)
        means = sums / counts - adjusted.mean()
    own = adjusted - means[data.seeds]
    blocks = rng.choice(_FACTORS, size=(count, data.blocks.max() + 1))
    common = rng.choice(_FACTORS, size=(count, seeds)) * np.sqrt(seeds / max(1, seeds - 1))
    return own * blocks[:, data.blocks] + (means * common)[:, data.seeds]
