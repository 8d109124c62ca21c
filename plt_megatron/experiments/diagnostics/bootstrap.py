"""Bootstrap intervals of means over sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from plt_megatron.experiments.report.statistics import t_quantile

LEVEL = 0.95
RESAMPLES = 2000
_COLUMNS = 4096  # bootstrapped at once, so that memory stays bounded


@dataclass(frozen=True)
class Intervals:
    """Means of quantities of one shape, and where 95 % of their resampled means lie. NaN: not defined.

    `low` and `high` are NaN where there are fewer than two sequences.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at(self, *index: int) -> tuple[float, float, float]:
        """(mean, low, high) of one of them."""
        return float(self.mean[index]), float(self.low[index]), float(self.high[index])


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
