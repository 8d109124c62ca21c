"""Means over seeds with Student's t intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with `degrees` of freedom stays below with `probability`."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
