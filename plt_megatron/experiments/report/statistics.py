"""Means over seeds with Student's t intervals, and paired differences. No more than that, and without scipy."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_FEW = 1e-30  # in place of zero in the continued fraction


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values. `half`: half the width of its t interval, None for a single value."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half

    def excludes_zero(self) -> bool:
        """Whether the interval, if there is one, lies on one side of zero."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean and t interval of at least one finite value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, t_quantile((1 + level) / 2, n - 1) * math.sqrt(variance / n), n)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], level: float = 0.95
) -> Estimate | None:
    """`values` minus `reference` over the seeds both have; None if there is none."""
    common = sorted(values.keys() & reference.keys())
    if not common:
        return None
    return estimate([values[seed] - reference[seed] for seed in common], level)


@functools.lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with `degrees` of freedom stays below with `probability`, 0.5 <= it < 1."""
    assert 0.5 <= probability < 1 and degrees >= 1
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    """For t >= 0."""
    return 1 - _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Lentz)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction = c = 1.0
    d = 0.0
    for index in range(400):
        m = index // 2
        if index == 0:
            term = 1.0
        elif index % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or _FEW)
        c = 1 + term / c or _FEW
        fraction *= c * d
        if index and abs(c * d - 1) < 1e-14:
            break
    return math.exp(log_front) / a * (fraction - 1)
