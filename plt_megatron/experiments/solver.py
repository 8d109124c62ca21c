"""The runs of a scaling law, and least squares for it by variable projection.

    L = E + A (N_once + r^phi N_loop)^-alpha + B D^-beta,   one phi for each variant

Given alpha, beta and the phis the law is linear in E, A and B, which are solved for exactly (none below 0) at each step
of the search over the others (Golub and Pereyra 1973, with Kaufman's Jacobian). A search over three to six numbers
instead of six to nine needs no starting values for the linear ones and ends in a tenth of the steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plt_megatron.errors import UserError

# The ranges searched; a fit at either end is not determined by the data.
EXPONENTS = (0.02, 3.0)
PHIS = (-2.0, 4.0)
SAME = 0.05  # relative: nearer sizes, or token counts, are one
# A and B are fitted for sizes and tokens in these units, where they hardly depend on the exponents.
UNIT_N, UNIT_D = 1e6, 1e7
_STARTS = 3
_TOLERANCE = 1e-9
_SINGULAR = 1e-10  # relative to the largest diagonal entry of R


@dataclass(frozen=True)
class Shape:
    """A model as the law sees it.

    Attributes:
        variant: how its loops are wired; irrelevant for a model of one loop.
        once, looped: parameters that a token passes once, and in each loop; without embeddings.
    """

    variant: str
    once: float
    looped: float
    loops: int

    def trained(self, tokens: float, loss: float = 0.0, block: str = "", seed: int = 1) -> Run:
        return Run(self.variant, self.once, self.looped, self.loops, tokens, loss, block, seed)


@dataclass(frozen=True)
class Run(Shape):
    """A model with its training, finished or to be predicted.

    Attributes:
        tokens: number of training tokens.
        loss: final loss, in nats per token or bits per byte; 0 before training.
        block: runs of the same block share a part of their training (branches of one trunk), and thus their noise.
        seed: seed of weights and data order.
    """

    tokens: float
    loss: float = 0.0
    block: str = ""
    seed: int = 1


def distinct(values: np.ndarray) -> int:
    """Count sizes, or token counts; nearer ones than `SAME` are one, as of gates or of budgets of equal FLOPs."""
    return 1 + int((np.diff(np.sort(np.log(values))) > SAME).sum())


@dataclass(frozen=True)
class Arrays:
    """Runs as arrays [n].

    Attributes:
        variants: names of the variants that have a run with several loops.
        variant: index of each run's variant; 0 for one loop, whatever its variant.
        blocks, seeds: indices from 0.
    """

    variants: tuple[str, ...]
    variant: np.ndarray
    once: np.ndarray
    looped: np.ndarray
    loops: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    blocks: np.ndarray
    seeds: np.ndarray

    @property
    def n(self) -> int:
        return len(self.loss)

    @property
    def terms(self) -> tuple[bool, bool]:
        """Whether their law has terms of N and of D: without variants only if N (or D) varies; the coefficient of an
        absent term is 0."""
        if self.variants:
            return True, True
        return distinct(self.looped) > 1, distinct(self.tokens) > 1

    @property
    def coefficients(self) -> int:
        """Number of coefficients of their law."""
        return 1 + 2 * sum(self.terms) + len(self.variants)

    def subset(self, rows: np.ndarray) -> Arrays:
        """Return the runs `rows` (indices or a mask), with the same variants; blocks and seeds are renumbered."""
        arrays = {name: values[rows] for name, values in vars(self).items() if name != "variants"}
        for name in ("blocks", "seeds"):
            arrays[name] = np.unique(arrays[name], return_inverse=True)[1]
        return Arrays(self.variants, **arrays)


def looped_variants(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the variants that have a run with several loops, in order of appearance."""
    return tuple(dict.fromkeys(each.variant for each in runs if each.loops > 1))


def to_arrays(runs: Sequence[Run], variants: Sequence[str]) -> Arrays:
    """Convert runs to arrays. `variants`: names of all variants with several loops.

    Raises `UserError` if a loss is not a number, or a size is not positive.
    """
    for each in runs:
        sound = math.isfinite(each.loss) and each.once >= 0 and each.looped > 0 and each.tokens > 0 and each.loops >= 1
        if not sound:
            raise UserError(f"{each.block}: the law needs finite losses and positive sizes, got {each}")
    index = {name: place for place, name in enumerate(variants)}
    once, looped, loops, tokens, loss = (
        np.array([float(getattr(each, name)) for each in runs])
        for name in ("once", "looped", "loops", "tokens", "loss")
    )
    variant = np.array([index[each.variant] if each.loops > 1 else 0 for each in runs], dtype=int)
    blocks, seeds = _indices([each.block for each in runs]), _indices([each.seed for each in runs])
    return Arrays(tuple(variants), variant, once, looped, loops, tokens, loss, blocks, seeds)


def _indices(values: Sequence[object]) -> np.ndarray:
    known = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return np.array([known[value] for value in values], dtype=int)


# ---------------------------------------------------------------- least squares


@dataclass(frozen=True)
class Solution:
    """A minimum. `theta`: [5 + phis], E, A, B, then the shape: alpha, beta, phis; `cost`: weighted squares / 2."""

    theta: np.ndarray
    cost: float

    @property
    def shape(self) -> np.ndarray:
        return self.theta[3:]


def evaluate(theta: np.ndarray, data: Arrays) -> np.ndarray:
    """Return losses [b, n] of the laws theta [b, 5 + phis]."""
    worth = data.loops ** _phi_of_each(theta[:, 5:], data)
    log_n = np.log(data.once + worth * data.looped) - np.log(UNIT_N)
    log_d = np.log(data.tokens) - np.log(UNIT_D)
    size = theta[:, 1, None] * np.exp(-theta[:, 3, None] * log_n)
    return theta[:, 0, None] + size + theta[:, 2, None] * np.exp(-theta[:, 4, None] * log_d)


def _phi_of_each(phis: np.ndarray, data: Arrays) -> np.ndarray:
    """Return the phi [..., n] of each run; without variants all runs are of one loop, and any phi will do."""
    return phis[..., data.variant] if data.variants else np.zeros(data.n)


def jacobian(theta: np.ndarray, data: Arrays) -> np.ndarray:
    """Return derivatives [n, 5 + phis] of the losses of one law theta [5 + phis]."""
    _, a, b = theta[:3]
    columns, slopes = _columns(theta[3:], data)
    scaled = slopes * np.array([a, b, *[a] * (len(theta) - 5)])
    return np.concatenate([columns, scaled], axis=1)


def solve(
    data: Arrays,
    losses: np.ndarray,
    weights: np.ndarray,
    start: np.ndarray | None = None,
    fixed: dict[int, float] | None = None,
) -> Solution:
    """Find the law with the smallest weighted squared error.

    Args:
        losses, weights: [n].
        start: shape to start at; None: the best points of a grid.
        fixed: values of the shape that are not searched, by index.
    """
    absent = {index: EXPONENTS[0] for index, has in enumerate(data.terms) if not has}
    problem = _Problem(data, losses, np.sqrt(weights), {**absent, **(fixed or {})})
    starts = problem.grid()[:_STARTS] if start is None else [start]
    return min((problem.descend(each) for each in starts), key=lambda found: found.cost)


def _columns(shape: np.ndarray, data: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Return (the factors of E, A and B [n, 3], the derivatives of these columns by alpha, beta and the phis)."""
    alpha, beta, phis = shape[0], shape[1], shape[2:]
    looped = data.loops ** _phi_of_each(phis, data) * data.looped
    total = data.once + looped
    log_n, log_d = np.log(total / UNIT_N), np.log(data.tokens / UNIT_D)
    size, text = np.exp(-alpha * log_n), np.exp(-beta * log_d)
    by_phi = -alpha * size * looped / total * np.log(data.loops)
    own = (np.where(data.variant == index, by_phi, 0.0) for index in range(len(phis)))
    slopes = [-size * log_n, -text * log_d, *own]
    return np.stack([np.ones_like(size), size, text], axis=1), np.stack(slopes, axis=1)


@dataclass
class _Problem:
    data: Arrays
    losses: np.ndarray
    roots: np.ndarray  # of the weights
    fixed: dict[int, float]

    def __post_init__(self) -> None:
        count = 2 + len(self.data.variants)
        self.kept = np.array([True, *self.data.terms])  # which of E, A and B the law has
        self.free = [index for index in range(count) if index not in self.fixed]
        self.count = count
        self.low = np.array([EXPONENTS[0]] * 2 + [PHIS[0]] * (count - 2))
        self.high = np.array([EXPONENTS[1]] * 2 + [PHIS[1]] * (count - 2))
        self.target = self.roots * self.losses
        self._at = functools.lru_cache(maxsize=2)(self._project)  # residuals and Jacobian are asked for in turn

    def shape(self, free: np.ndarray) -> np.ndarray:
        """Return the whole shape, from its free part in the unbounded form that is searched."""
        shape = np.empty(self.count)
        bounded = np.tanh(free) / 2 + 0.5
        shape[self.free] = self.low[self.free] + bounded * (self.high - self.low)[self.free]
        shape[list(self.fixed)] = list(self.fixed.values())
        return shape

    def unbounded(self, shape: np.ndarray) -> np.ndarray:
        low, high = self.low[self.free], self.high[self.free]
        return np.arctanh(2 * np.clip((shape[self.free] - low) / (high - low), 1e-3, 1 - 1e-3) - 1)

    def descend(self, start: np.ndarray) -> Solution:
        from scipy.optimize import least_squares

        found = least_squares(
            lambda free: self._at(free.tobytes())[0],
            self.unbounded(start),
            lambda free: self._at(free.tobytes())[1],
            method="lm",
            xtol=_TOLERANCE,
            ftol=_TOLERANCE,
        )
        residuals, _, linear = self._project(found.x.tobytes())
        return Solution(np.concatenate([linear, self.shape(found.x)]), float(residuals @ residuals) / 2)

    def _project(self, key: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return weighted residuals [n], their derivatives by the free part [n, free], and linear coefficients [3]."""
        free = np.frombuffer(key)
        shape = self.shape(free)
        columns, slopes = _columns(shape, self.data)
        columns = self.roots[:, None] * columns[:, self.kept]
        linear, q = np.zeros(3), columns
        linear[self.kept], q = _linear(columns, self.target)
        scale = np.array([linear[1], linear[2], *[linear[1]] * (self.count - 2)])
        chain = (self.high - self.low)[self.free] / 2 / np.cosh(np.clip(free, -50, 50)) ** 2  # of `shape`
        own = slopes[:, self.free] * (scale[self.free] * chain) * self.roots[:, None]
        return columns @ linear[self.kept] - self.target, own - q @ (q.T @ own), linear

    def grid(self) -> list[np.ndarray]:
        """Return shapes to start at, best first."""
        exponents = np.geomspace(0.08, 1.2, 6)
        shapes = {}
        for alpha, beta, phi in itertools.product(exponents, exponents, (0.1, 0.5, 0.9)):
            shape = np.array([alpha, beta, *[phi] * (self.count - 2)])
            shape[list(self.fixed)] = list(self.fixed.values())
            shapes[shape.tobytes()] = shape
        return sorted(shapes.values(), key=self._cost)

    def _cost(self, shape: np.ndarray) -> float:
        columns = self.roots[:, None] * _columns(shape, self.data)[0][:, self.kept]
        residuals = columns @ _non_negative(columns, self.target) - self.target
        return float(residuals @ residuals)


def _linear(columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `_non_negative` coefficients, and an orthonormal basis [n, <= 3] of the columns with nonzero ones."""
    q, r = np.linalg.qr(columns)
    diagonal = np.abs(r.diagonal())
    if diagonal.min() > _SINGULAR * diagonal.max():
        linear = np.linalg.solve(r, q.T @ target)
        if (linear > 0).all():
            return linear, q
    linear = _non_negative(columns, target)
    return linear, np.linalg.qr(columns[:, linear > 0])[0]


def _non_negative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the least-squares coefficients of the columns [n, k], none of them below 0."""
    linear = np.linalg.lstsq(columns, target, rcond=None)[0]
    if (linear >= 0).all():
        return linear
    from scipy.optimize import nnls

    return nnls(columns, target)[0]
