"""How sure a number is: the intervals that reports have, all of one kind.

Runs with seeds: a mean with Student's t interval, differences paired by seed. Sequences of one model: the bootstrap of
a mean, resampled alike for all quantities. A law: the block bootstrap of what else its runs could have said, had their
luck been another. Blocks are runs that share a part of their training, and runs with the same seed. Sizes, loops and
tokens stay as they are (they were chosen, not drawn); a block's residuals change their sign and size together by a
random factor (the wild cluster bootstrap, Cameron, Gelbach and Miller 2008, with Webb's six factors). Before that each
block's residuals are freed of the fit's pull towards it (Bell and McCaffrey 2002): a law of eight coefficients through
two dozen blocks makes residuals smaller than the luck that they stand for.
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
_COLUMNS = 4096  # bootstrapped at once, so that memory stays bounded
_FACTORS = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])
_SMALLEST = 0.05  # of what a block keeps for itself: one that alone determines a coefficient has no residual


@dataclass(frozen=True)
class Interval:
    """A value, and where it lies; NaN ends: there is no interval. `n`: values that it is the mean of; 0: it is none."""

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
        """1 or -1 where the interval lies on one side of zero, else 0: not told."""
        return (self.low > 0) - (self.high < 0)

    def text(self, form: str) -> str:
        """`1.23 [1.20, 1.26]`; empty where the value is NaN, the value alone without an interval."""
        if math.isnan(self.value):
            return ""
        ends = f" [{self.low:{form}}, {self.high:{form}}]" if self.is_known else ""
        return f"{self.value:{form}}{ends}"


# ---------------------------------------------------------------- over seeds


def estimate(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and t interval of at least one finite value; a single one has no interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, n=1)
    half = t_quantile((1 + level) / 2, n - 1) * statistics.stdev(values, mean) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], level: float = LEVEL
) -> Interval | None:
    """`values` minus `reference` over the seeds both have; None if there is none."""
    common = sorted(values.keys() & reference.keys())
    return estimate([values[seed] - reference[seed] for seed in common], level) if common else None


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with `degrees` of freedom stays below with `probability`."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def stretch(level: float, degrees: int) -> float:
    """Student's t quantile over the normal one: how much wider few residuals make an interval."""
    probability = (1 + level) / 2
    return t_quantile(probability, degrees) / NormalDist().inv_cdf(probability)


# ---------------------------------------------------------------- over sequences


@dataclass(frozen=True)
class Intervals:
    """Means of quantities of one shape, and where 95 % of their resampled means lie. NaN: not defined.

    `low` and `high` are NaN where there are fewer than two sequences.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at(self, *index: int) -> Interval:
        """One of them."""
        return Interval(float(self.mean[index]), float(self.low[index]), float(self.high[index]))


class Bootstrap:
    """The same resamples of n sequences for every quantity, so that differences are paired.

    The interval is the percentile interval, widened for small n (Hesterberg 2015, "expanded percentile"): the plain one
    is too narrow by sqrt((n - 1) / n) and by the normal's tails in place of Student's.
    """

    def __init__(self, sequences: int, seed: int) -> None:
        self.sequences = sequences
        rng = np.random.default_rng(seed)
        self._counts = rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES).astype(np.float64)
        tail = (1 - LEVEL) / 2
        if sequences > 1:
            tail = normal_tail(math.sqrt(sequences / (sequences - 1)) * t_quantile(1 - tail, sequences - 1))
        self._quantiles = (tail, 1 - tail)

    def intervals(self, values: np.ndarray) -> Intervals:
        """Intervals of the means of values [n, ...], float64. A sequence where a value is NaN does not count for it."""
        assert len(values) == self.sequences
        flat = values.reshape(len(values), -1)
        parts = [self._columns(flat[:, first : first + _COLUMNS]) for first in range(0, flat.shape[1], _COLUMNS)]
        mean, low, high = (np.concatenate(pieces).reshape(values.shape[1:]) for pieces in zip(*parts, strict=True))
        return Intervals(mean, low, high)

    def _columns(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        defined = ~np.isnan(values)
        filled = np.where(defined, values, 0.0)
        number = defined.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = filled.sum(0) / number
            # Relative to the mean, so that rounding does not show where all values are equal.
            centered = np.where(defined, values - mean, 0.0)
            resampled = (self._counts @ centered) / (self._counts @ defined.astype(np.float64))
        bounds = np.full((2, values.shape[1]), math.nan)
        enough = number > 1
        if enough.any():
            bounds[:, enough] = mean[enough] + np.nanquantile(resampled[:, enough], self._quantiles, axis=0)
        return mean, bounds[0], bounds[1]


def normal_tail(z: float) -> float:
    """The probability that a standard normal variable exceeds z."""
    return math.erfc(z / math.sqrt(2)) / 2


# ---------------------------------------------------------------- of a law


def adjusted_residuals(residuals: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, data: Arrays) -> np.ndarray:
    """Residuals [n] at the size of the errors that they come from: (I - H_gg)^-1/2 of each block's.

    Args:
        jacobian: [n, p] of the losses by all coefficients.
    """
    roots = np.sqrt(weights)
    orthogonal = _range(roots[:, None] * jacobian)
    adjusted = np.empty_like(residuals)
    for block in range(data.blocks.max() + 1):
        rows = np.flatnonzero(data.blocks == block)
        own = orthogonal[rows]
        values, vectors = np.linalg.eigh(np.eye(len(rows)) - own @ own.T)
        root = vectors / np.maximum(values, _SMALLEST) @ vectors.T
        adjusted[rows] = root @ (roots[rows] * residuals[rows]) / roots[rows]
    return adjusted


def draw_errors(adjusted: np.ndarray, data: Arrays, count: int, rng: np.random.Generator) -> np.ndarray:
    """Errors [count, n]: what all runs of a seed have in common, and what is a block's own, each with its factor."""
    seeds = data.seeds.max() + 1
    means = np.zeros(seeds)
    if seeds > 1:
        sums, counts = np.bincount(data.seeds, adjusted), np.bincount(data.seeds)
        means = sums / counts - adjusted.mean()
    own = adjusted - means[data.seeds]
    blocks = rng.choice(_FACTORS, size=(count, data.blocks.max() + 1))
    common = rng.choice(_FACTORS, size=(count, seeds)) * np.sqrt(seeds / max(1, seeds - 1))
    return own * blocks[:, data.blocks] + (means * common)[:, data.seeds]


def _range(matrix: np.ndarray) -> np.ndarray:
    """An orthonormal basis [n, rank] of the columns: a coefficient at its bound has none of its own."""
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, values > 1e-10 * values.max(initial=0.0)]
