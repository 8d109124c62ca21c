"""Least squares for the law by variable projection.

    L = E + A (N_once + r^phi N_loop)^-alpha + B D^-beta,   one phi for each variant

Given alpha, beta and the phis the law is linear in E, A and B, which are solved for exactly (none below 0) at each step
of the search over the others (Golub and Pereyra 1973, with Kaufman's Jacobian). A search over three to six numbers
instead of six to nine needs no starting values for the linear ones and ends in a tenth of the steps.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from plt_megatron.experiments.study.observations import Arrays

# What is searched; a fit that ends at either end is not determined.
EXPONENTS = (0.02, 3.0)
PHIS = (-2.0, 4.0)
# A and B are fitted for sizes and tokens in these units, where they hardly depend on the exponents.
UNIT_N, UNIT_D = 1e6, 1e7
LINEAR = ("E", "A", "B")
_STARTS = 3
_TOLERANCE = 1e-9
_SINGULAR = 1e-10  # of the largest column's part that no other has


@dataclass(frozen=True)
class Solution:
    """A minimum. `linear`: [3], E, A and B; `shape`: [2 + phis], alpha, beta, phis; `cost`: weighted squares / 2."""

    linear: np.ndarray
    shape: np.ndarray
    cost: float

    @property
    def theta(self) -> np.ndarray:
        """[5 + phis]: E, A, B, alpha, beta, phis."""
        return np.concatenate([self.linear, self.shape])


def evaluate(theta: np.ndarray, data: Arrays, groups: np.ndarray) -> np.ndarray:
    """Losses [b, n] of the laws theta [b, 5 + phis]; `groups` [variants]: the phi that each variant has."""
    phis = theta[:, 5:][:, groups[data.variant]]
    log_n = np.log(data.once + data.loops**phis * data.looped) - np.log(UNIT_N)
    log_d = np.log(data.tokens) - np.log(UNIT_D)
    size = theta[:, 1, None] * np.exp(-theta[:, 3, None] * log_n)
    return theta[:, 0, None] + size + theta[:, 2, None] * np.exp(-theta[:, 4, None] * log_d)


def jacobian(theta: np.ndarray, data: Arrays, groups: np.ndarray) -> np.ndarray:
    """Derivatives [n, 5 + phis] of the losses of one law theta [5 + phis]."""
    _, a, b = theta[:3]
    columns, slopes = _columns(theta[3:], data, groups)
    scaled = slopes * np.array([a, b, *[a] * (len(theta) - 5)])
    return np.concatenate([columns, scaled], axis=1)


def solve(
    data: Arrays,
    groups: np.ndarray,
    losses: np.ndarray,
    weights: np.ndarray,
    start: np.ndarray | None = None,
    fixed: dict[int, float] | None = None,
) -> Solution:
    """The law with the smallest weighted squared error.

    Args:
        groups: [variants], the phi that each variant has.
        losses, weights: [n].
        start: the shape to begin at; None: the best points of a grid.
        fixed: index of the shape -> its value, which is not searched.
    """
    problem = _Problem(data, groups, losses, np.sqrt(weights), fixed or {})
    starts = problem.grid()[:_STARTS] if start is None else [start]
    return min((problem.descend(each) for each in starts), key=lambda found: found.cost)


def _columns(shape: np.ndarray, data: Arrays, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what E, A and B are multiplied with [n, 3], derivatives of the own column by alpha, beta and the phis)."""
    alpha, beta, phis = shape[0], shape[1], shape[2:]
    group = groups[data.variant]
    looped = data.loops ** phis[group] * data.looped
    total = data.once + looped
    log_n, log_d = np.log(total / UNIT_N), np.log(data.tokens / UNIT_D)
    size, text = np.exp(-alpha * log_n), np.exp(-beta * log_d)
    by_phi = -alpha * size * looped / total * np.log(data.loops)
    slopes = [-size * log_n, -text * log_d, *(np.where(group == index, by_phi, 0.0) for index in range(len(phis)))]
    return np.stack([np.ones_like(size), size, text], axis=1), np.stack(slopes, axis=1)


@dataclass
class _Problem:
    data: Arrays
    groups: np.ndarray
    losses: np.ndarray
    roots: np.ndarray  # of the weights
    fixed: dict[int, float]

    def __post_init__(self) -> None:
        count = 2 + (int(self.groups.max()) + 1 if len(self.groups) else 0)
        self.free = [index for index in range(count) if index not in self.fixed]
        self.count = count
        self.low = np.array([EXPONENTS[0]] * 2 + [PHIS[0]] * (count - 2))
        self.high = np.array([EXPONENTS[1]] * 2 + [PHIS[1]] * (count - 2))
        self.target = self.roots * self.losses
        self._at = functools.lru_cache(maxsize=2)(self._project)  # residuals and Jacobian are asked for in turn

    def shape(self, free: np.ndarray) -> np.ndarray:
        """The whole shape, from the free part in the unbounded form that is searched."""
        shape = np.empty(self.count)
        bounded = np.tanh(free) / 2 + 0.5
        shape[self.free] = self.low[self.free] + bounded * (self.high - self.low)[self.free]
        for index, value in self.fixed.items():
            shape[index] = value
        return shape

    def unbounded(self, shape: np.ndarray) -> np.ndarray:
        low, high = self.low[self.free], self.high[self.free]
        return np.arctanh(2 * np.clip((shape[self.free] - low) / (high - low), 1e-3, 1 - 1e-3) - 1)

    def descend(self, start: np.ndarray) -> Solution:
        from scipy.optimize import least_squares

        if not self.free:
            return self._solution(np.empty(0))
        found = least_squares(
            lambda free: self._at(free.tobytes())[0],
            self.unbounded(start),
            lambda free: self._at(free.tobytes())[1],
            method="lm",
            xtol=_TOLERANCE,
            ftol=_TOLERANCE,
        )
        return self._solution(found.x)

    def _solution(self, free: np.ndarray) -> Solution:
        residuals, _, linear = self._project(free.tobytes())
        return Solution(linear, self.shape(free), float(residuals @ residuals) / 2)

    def _project(self, key: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weighted residuals [n], their derivatives by the free part [n, free], and the linear coefficients [3]."""
        free = np.frombuffer(key)
        shape = self.shape(free)
        columns, slopes = _columns(shape, self.data, self.groups)
        columns = self.roots[:, None] * columns
        linear, q = _linear(columns, self.target)
        scale = np.array([linear[1], linear[2], *[linear[1]] * (self.count - 2)])
        chain = (self.high - self.low)[self.free] / 2 / np.cosh(np.clip(free, -50, 50)) ** 2  # of `shape`
        own = slopes[:, self.free] * (scale[self.free] * chain) * self.roots[:, None]
        return columns @ linear - self.target, own - q @ (q.T @ own), linear

    def grid(self) -> list[np.ndarray]:
        """Shapes to begin at, best first."""
        exponents = np.geomspace(0.08, 1.2, 6)
        shapes = []
        for alpha, beta, phi in itertools.product(exponents, exponents, (0.1, 0.5, 0.9)):
            shape = np.array([alpha, beta, *[phi] * (self.count - 2)])
            for index, value in self.fixed.items():
                shape[index] = value
            shapes.append(shape)
        return sorted(shapes, key=self._cost)

    def _cost(self, shape: np.ndarray) -> float:
        columns = self.roots[:, None] * _columns(shape, self.data, self.groups)[0]
        residuals = columns @ _non_negative(columns, self.target) - self.target
        return float(residuals @ residuals)


def _linear(columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_non_negative`, and an orthonormal basis of the columns with a coefficient [n, <= 3]."""
    q, r = np.linalg.qr(columns)
    diagonal = np.abs(r.diagonal())
    if diagonal.min() > _SINGULAR * diagonal.max():
        linear = np.linalg.solve(r, q.T @ target)
        if (linear > 0).all():
            return linear, q
    linear = _non_negative(columns, target)
    return linear, np.linalg.qr(columns[:, linear > 0])[0]


def _non_negative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The least-squares coefficients [3], none of them below 0."""
    linear = np.linalg.lstsq(columns, target, rcond=None)[0]
    if (linear >= 0).all():
        return linear
    from scipy.optimize import nnls

    return nnls(columns, target)[0]
