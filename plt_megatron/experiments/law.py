"""Scaling laws: L = E + A N^-alpha + B D^-beta, with N = N_once + r^phi N_loop and a phi for each variant.

phi is the worth of a loop: at 1 a model of r loops is as good as one with r times the layers, at 0 looping has no
effect (arXiv 2604.21106 finds 0.46). All variants share the rest of the law, so that runs of one loop serve each.

A study's fit is robust (Huber's weights), so that no single bad run decides it. Runs of one wiring, as in a sweep, have
no phi and equal weights, since the median of a few residuals is a poor estimate of their size. If their N (or D) does
not vary, its term cannot be separated from E and is left out. A fit needs more points than coefficients, at several
sizes and token counts; otherwise it is refused.

Intervals are centered on the fit and stretched by Student's t over the normal, since few points leave the size of the
residuals uncertain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from plt_megatron.errors import UserError
from plt_megatron.experiments.intervals import LEVEL, Interval, adjusted_residuals, draw_errors, stretch
from plt_megatron.experiments.solver import (
    EXPONENTS,
    PHIS,
    UNIT_D,
    UNIT_N,
    Arrays,
    Model,
    Observation,
    Solution,
    Terms,
    evaluate,
    jacobian,
    looped_variants,
    models_to_arrays,
    solve,
    to_arrays,
)

FARTHEST = 10.0  # factor beyond its runs up to which the law is trusted
_SPARE = 2  # a fit has at least this many more points than coefficients
_DISTINCT = 3  # distinct sizes, and distinct token counts, that their exponents need
SAME = 0.05  # relative: nearer sizes count as one
_HUBER = 1.345  # standard deviations beyond which a residual counts less: 95 % efficient for normal errors
_ROUNDS = 12  # rounds of reweighting, at most
_TINY = 1e-12  # replaces a coefficient of 0 in logarithms
_REFITS = 2  # rounds of reweighting in a draw of the bootstrap


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        groups: [variants], index of each variant's phi: one each, unless they were required to be equal.
        theta: [5 + phis], E, A, B, alpha, beta, phis; A and B for sizes in `UNIT_N` and tokens in `UNIT_D`.
        weights: [n], Huber's; below 1 for runs that the law does not explain.
        residuals: [n], loss minus fitted loss.
        adjusted: [n], residuals at the size of the errors.
        samples: [b, 5 + phis], thetas of the bootstrap, stretched.
        notes: caveats for readers.
        terms: whether there are terms of N and of D.
    """

    data: Arrays
    groups: np.ndarray
    theta: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    adjusted: np.ndarray
    samples: np.ndarray
    cost: float
    level: float
    notes: tuple[str, ...] = ()
    terms: Terms = (True, True)

    @property
    def rms_residual(self) -> float:
        return math.sqrt(float(np.mean(self.residuals**2)))

    @property
    def coefficients(self) -> dict[str, Interval]:
        """E, and alpha, beta, A and B of the terms in the law; A and B for N and D in single parameters and tokens."""
        has_n, has_d = self.terms
        names = ("E", *(("A", "alpha") if has_n else ()), *(("B", "beta") if has_d else ()))
        return {name: self.interval(_natural(self._rows, name)) for name in names}

    @property
    def phis(self) -> dict[str, Interval]:
        """phi by variant."""
        return {name: self.interval(self._rows[:, self.phi_column(name)]) for name in self.data.variants}

    def phi_column(self, variant: str) -> int:
        """Return the index of the variant's phi in theta."""
        return 5 + int(self.groups[self.data.variants.index(variant)])

    def difference(self, variant: str, reference: str) -> Interval:
        """Return the phi of `variant` minus that of `reference`."""
        return self.interval(self._rows[:, self.phi_column(variant)] - self._rows[:, self.phi_column(reference)])

    @property
    def _rows(self) -> np.ndarray:
        return np.vstack([self.theta, self.samples])

    def interval(self, values: np.ndarray) -> Interval:
        """Return the interval of a quantity [1 + b], given for the fit first and then for each sample."""
        low, high = self.bounds(values[1:])
        return Interval(float(values[0]), float(low), float(high))

    def bounds(self, values: np.ndarray) -> np.ndarray:
        """Return both ends [2, ...] of the interval of quantities [b, ...] over the samples."""
        ends = [(1 - self.level) / 2, (1 + self.level) / 2]
        return np.quantile(values, ends, axis=0, method="weibull")  # whatever the number of draws

    def fitted(self, models: Sequence[Model]) -> np.ndarray:
        """Return the losses [m] of models by the fit, however far from its runs. Raises `UserError` like `drawn`."""
        return evaluate(self.theta[None], self._asked(models), self.groups)[0]

    def drawn(self, models: Sequence[Model]) -> np.ndarray:
        """Return the losses [1 + b, m] of models by the fit, first, and by its samples.

        Raises:
            UserError: a model with several loops is of a variant without a phi.
        """
        return evaluate(self._rows, self._asked(models), self.groups)

    def _asked(self, models: Sequence[Model]) -> Arrays:
        unknown = sorted({m.variant for m in models if m.loops > 1} - set(self.data.variants))
        if unknown:
            raise UserError(f"the law has no phi for {', '.join(unknown)}: no finished run of it has several loops")
        return models_to_arrays(models, self.data.variants)

    def predict(self, model: Model) -> Interval:
        """Predict a model's loss. Raises `UserError` for a model that is `beyond` the law's runs."""
        beyond = self.beyond([model])
        if beyond:
            raise UserError(f"no prediction: {beyond}, where the law is not known to hold")
        return self.interval(self.drawn([model])[:, 0])

    def beyond(self, models: Sequence[Model]) -> str:
        """Describe how far models are outside of the law's runs; empty within `FARTHEST` times them. Without a term of
        N (or D), the law holds only for the N (or D) of its runs."""
        return " and ".join(distance for distance, _ in self._outside(models))

    def needed(self, models: Sequence[Model]) -> str:
        """Describe the runs that would keep models from being `beyond`; empty if they are not."""
        runs = " and ".join(bound for _, bound in self._outside(models))
        return f"runs of {runs}" if runs else ""

    def _outside(self, models: Sequence[Model]) -> Iterator[tuple[str, str]]:
        """Yield how far models are outside, and the nearest runs that would suffice, for sizes, tokens and loops."""
        data = self.data
        own = data.once + data.looped
        asked = np.array([m.once + m.looped for m in models])
        tokens = np.array([m.tokens for m in models])
        names = ("parameters", "tokens")
        for what, has, values, known in zip(names, self.terms, (asked, tokens), (own, data.tokens), strict=True):
            up, down = values.max() / known.max(), known.min() / values.min()
            if max(up, down) <= (FARTHEST if has else 1.001):
                continue
            if up >= down:
                yield f"{up:,.0f} times more {what} than any run has", f"at least {values.max() / FARTHEST:.3g} {what}"
            else:
                needed = f"at most {values.min() * FARTHEST:.3g} {what}"
                yield f"{down:,.0f} times fewer {what} than any run has", needed
        loops = max(m.loops for m in models)
        if loops > data.loops.max():
            yield f"{loops} loops where runs have at most {int(data.loops.max())}", f"{loops} loops"


def fit_law(
    observations: Sequence[Observation] | Arrays,
    *,
    variants: Sequence[str] | None = None,
    with_phi: bool = True,
    equal: bool = False,
    bootstraps: int = 400,
    level: float = LEVEL,
    seed: int = 0,
) -> LawFit:
    """Fit the law.

    Args:
        variants: order of the variants; None: that of the observations.
        with_phi: whether to fit loops; else all runs are of one wiring, with all parameters as `looped`, once.
        equal: whether all variants share one phi.
        bootstraps: number of draws for the intervals; 0: none, and `samples` is empty.

    Raises:
        UserError: the observations do not determine the law, or a loss is not a number.
    """
    if not isinstance(observations, Arrays):
        found = looped_variants(observations) if with_phi else ()
        observations = to_arrays(observations, [name for name in variants or found if name in found])
    data = observations
    groups = np.zeros(len(data.variants), dtype=int) if equal else np.arange(len(data.variants))
    problem = what_is_missing(data, groups, with_phi)
    if problem:
        raise UserError(f"{'no law yet' if with_phi else 'no fit'}: {problem}")
    terms = (True, True) if with_phi else _terms(data)
    count = 1 + 2 * sum(terms) + len(set(groups.tolist()))
    solution, weights, spread = _robust(data, groups, terms, count, _ROUNDS if with_phi else 0)
    residuals = data.loss - evaluate(solution.theta[None], data, groups)[0]
    adjusted = adjusted_residuals(residuals, jacobian(solution.theta, data, groups), weights, data)
    samples = np.empty((bootstraps, len(solution.theta)))
    errors = draw_errors(adjusted, data, bootstraps, np.random.default_rng(seed))
    for row, error in enumerate(errors):
        samples[row] = _refit(data, groups, terms, data.loss - residuals + error, solution, weights, spread)
    # Half: each coefficient depends on only a part of the blocks, a variant's phi on its own and those of one loop.
    degrees = max(3, (int(data.blocks.max()) + 1 - count) // 2)
    samples = _stretched(samples, solution.theta, stretch(level, degrees))
    notes = tuple(_notes(data, groups, solution.theta, weights, terms))
    return LawFit(
        data, groups, solution.theta, weights, residuals, adjusted, samples, solution.cost, level, notes, terms
    )


def _terms(data: Arrays) -> Terms:
    """Return whether the sizes and the tokens vary."""
    return len(np.unique(data.looped)) > 1, len(np.unique(data.tokens)) > 1


def what_is_missing(data: Arrays, groups: np.ndarray, with_phi: bool = True) -> str | None:
    """Describe the runs that the law lacks; None if it lacks none. `groups`: see `LawFit`."""
    if not with_phi:
        return _missing_without_phi(data)
    if not data.variants:
        return "no finished run has several loops, so phi is unknown"
    if not (data.loops == 1).any():
        return "no finished run has one loop, which every variant is measured against"
    for values, name in ((data.looped, "sizes"), (data.tokens, "numbers of tokens")):
        # Variants of one size differ by their gates; such sizes count as one.
        count = 1 + int((np.diff(np.sort(np.log(values))) > SAME).sum())
        if count < _DISTINCT:
            return f"{count} {name}; an exponent needs at least {_DISTINCT}"
    coefficients = 5 + int(groups.max()) + 1
    if data.n < coefficients + _SPARE:
        return f"{data.n} finished runs for {coefficients} coefficients; at least {coefficients + _SPARE} are needed"
    return None


def _missing_without_phi(data: Arrays) -> str | None:
    for values, name in ((data.looped, "model sizes"), (data.tokens, "token budgets")):
        count = len(np.unique(values))
        if 1 < count < _DISTINCT:
            return f"{count} {name}; an exponent needs at least {_DISTINCT}, or one to leave it out"
    terms = sum(_terms(data))
    if not terms:
        return "one model size and one token budget; a scaling law needs at least three of either"
    least = 1 + 2 * terms + _SPARE
    return f"{data.n} points for {least - _SPARE} coefficients; {least} are needed" if data.n < least else None


def _robust(
    data: Arrays, groups: np.ndarray, terms: Terms, count: int, rounds: int
) -> tuple[Solution, np.ndarray, float]:
    """Return the fit, its Huber weights (all 1 for 0 `rounds`), and the standard deviation they are based on."""
    weights, spread = np.ones(data.n), 0.0
    solution = solve(data, groups, data.loss, weights, terms=terms)
    for _ in range(rounds):
        residuals = data.loss - evaluate(solution.theta[None], data, groups)[0]
        spread = float(np.median(np.abs(residuals))) / NormalDist().inv_cdf(0.75)
        spread *= math.sqrt(data.n / (data.n - count))
        new = _weights(residuals, spread)
        if np.allclose(new, weights, atol=1e-3):
            break
        weights = new
        solution = solve(data, groups, data.loss, weights, start=solution.shape, terms=terms)
    return solution, weights, spread


def _refit(
    data: Arrays,
    groups: np.ndarray,
    terms: Terms,
    losses: np.ndarray,
    found: Solution,
    weights: np.ndarray,
    spread: float,
) -> np.ndarray:
    """Return theta for other losses, with weights of their own: with the fit's, intervals would be too narrow."""
    for _ in range(_REFITS):
        solution = solve(data, groups, losses, weights, start=found.shape, terms=terms)
        weights = _weights(losses - evaluate(solution.theta[None], data, groups)[0], spread)
    return solve(data, groups, losses, weights, start=solution.shape, terms=terms).theta


def _weights(residuals: np.ndarray, spread: float) -> np.ndarray:
    """Return Huber's weights; all 1 without noise."""
    if spread < 1e-12:
        return np.ones(len(residuals))
    return np.minimum(1.0, _HUBER * spread / np.maximum(np.abs(residuals), 1e-300))


def _stretched(samples: np.ndarray, theta: np.ndarray, factor: float) -> np.ndarray:
    """Stretch samples away from the fit; the coefficients A to beta, which are positive, in logarithms."""
    moved = theta + (samples - theta) * factor
    moved[:, 0] = np.maximum(moved[:, 0], 0.0)
    center, drawn = (np.log(np.maximum(values, _TINY)) for values in (theta[1:5], samples[:, 1:5]))
    moved[:, 1:5] = np.exp(np.clip(center + factor * (drawn - center), -50, 50))
    return moved


def _notes(data: Arrays, groups: np.ndarray, theta: np.ndarray, weights: np.ndarray, terms: Terms) -> Iterator[str]:
    names = ("one model size: the term of N is part of E", "one token budget: the term of D is part of E")
    yield from (text for text, has in zip(names, terms, strict=True) if not has)
    shape = [("alpha", theta[3], 1.05 * EXPONENTS[0], 0.95 * EXPONENTS[1])] if terms[0] else []
    shape += [("beta", theta[4], 1.05 * EXPONENTS[0], 0.95 * EXPONENTS[1])] if terms[1] else []
    for index, variant in enumerate(data.variants):
        shape.append((f"phi of {variant}", theta[5 + groups[index]], PHIS[0] + 0.1, PHIS[1] - 0.1))
    for name, value, low, high in shape:
        if not low < value < high:
            yield f"{name} is at the edge of the range searched: the runs do not determine it"
    for name, value, has in zip(("E", "A", "B"), theta[:3], (True, *terms), strict=True):
        if has and value == 0:
            yield f"{name} is 0: the runs do not show its term"
    few = int((weights < 0.5).sum())
    if few:
        yield f"{few} of {data.n} runs are far from the law and count less than half"


def _natural(theta: np.ndarray, name: str) -> np.ndarray:
    """Return a coefficient's column of theta [b, p], for N and D in single parameters and tokens."""
    if name == "A":
        return theta[:, 1] * UNIT_N ** theta[:, 3]
    if name == "B":
        return theta[:, 2] * UNIT_D ** theta[:, 4]
    return theta[:, {"E": 0, "alpha": 3, "beta": 4}[name]]


# ---------------------------------------------------------------- questions to a fitted law


@dataclass(frozen=True)
class Profile:
    """Values [k] of a variant's phi, and how much worse the best law with each fits: relative excess of squares [k]."""

    variant: str
    phi: np.ndarray
    excess: np.ndarray


@dataclass(frozen=True)
class NestedTest:
    """A test of equal phis. `p`: how often chance alone makes separate phis fit as much better, if they are equal."""

    variants: tuple[str, ...]
    statistic: float
    p: float

    @property
    def text(self) -> str:
        """The result in words."""
        names = " and ".join(self.variants)
        p = "p < 0.01" if self.p < 0.01 else f"p = {self.p:.2f}"
        return f"phi of {names}: {'different' if self.p < 0.05 else 'not told apart'} ({p})"


@dataclass(frozen=True)
class HeldOut:
    """Held-out runs and their predictions: rows [m] of the data, losses seen and predicted (`said`), intervals."""

    rows: np.ndarray
    seen: np.ndarray
    said: np.ndarray
    low: np.ndarray
    high: np.ndarray
    what: str

    @property
    def inside(self) -> int:
        """Number of runs within their interval, which is the law's and does not include a run's noise."""
        return int(((self.low <= self.seen) & (self.seen <= self.high)).sum())


def profile(fit: LawFit, variant: str, points: int = 25) -> Profile:
    """Fix the variant's phi at values around the fit's, and fit the rest."""
    column = fit.phi_column(variant)
    center, spread = fit.theta[column], max(float(np.std(fit.samples[:, column])), 1e-3)
    values = center + np.linspace(-4, 4, points) * spread
    costs = []
    for value in values:
        found = solve(fit.data, fit.groups, fit.data.loss, fit.weights, fit.theta[3:], {column - 3: float(value)})
        costs.append(found.cost)
    return Profile(variant, values, np.array(costs) / max(fit.cost, 1e-300) - 1)


def equal_phis(fit: LawFit, variants: Sequence[str], draws: int = 200, seed: int = 0) -> NestedTest:
    """Test whether the variants have one phi, by the bootstrap of a law in which they do.

    Raises:
        UserError: one of them has no phi.
    """
    unknown = [name for name in variants if name not in fit.data.variants]
    if unknown:
        raise UserError(f"no phi of {', '.join(unknown)} to compare: no finished run of it has several loops")
    data = fit.data
    free, equal = fit.groups, _joined(fit, variants)
    restricted = solve(data, equal, data.loss, fit.weights)
    fitted = evaluate(restricted.theta[None], data, equal)[0]

    def gain(losses: np.ndarray) -> float:
        one = solve(data, equal, losses, fit.weights, restricted.shape).cost
        each = solve(data, free, losses, fit.weights, fit.theta[3:]).cost
        return one / max(each, 1e-300) - 1

    errors = draw_errors(fit.adjusted, data, draws, np.random.default_rng(seed))
    statistic = gain(data.loss)
    larger = sum(gain(fitted + error) >= statistic for error in errors)
    return NestedTest(tuple(variants), statistic, (larger + 1) / (draws + 1))


def hold_out_largest(fit: LawFit, bootstraps: int = 100) -> HeldOut:
    """Predict the largest size from the others.

    Raises:
        UserError: the others do not determine a law.
    """
    data = fit.data
    is_largest = data.looped >= (1 - SAME) * data.looped.max()  # variants of one size differ by their gates
    what = "the largest size"
    rest = _renumbered(data.subset(~is_largest))
    smaller = fit_law(rest, bootstraps=bootstraps, level=fit.level)
    asked = data.subset(is_largest)
    said = evaluate(smaller.theta[None], asked, smaller.groups)[0]
    samples = evaluate(smaller.samples, asked, smaller.groups)
    low, high = fit.bounds(samples)
    return HeldOut(np.flatnonzero(is_largest), asked.loss, said, low, high, what)


def _joined(fit: LawFit, variants: Sequence[str]) -> np.ndarray:
    """Return groups [variants] in which the given variants share a phi."""
    columns = {fit.phi_column(name) for name in variants}
    first = min(columns)
    merged = [first if 5 + group in columns else 5 + group for group in fit.groups]
    order = sorted(set(merged))
    return np.array([order.index(column) for column in merged])


def _renumbered(data: Arrays) -> Arrays:
    """Renumber blocks and seeds from 0 without gaps."""
    blocks = np.unique(data.blocks, return_inverse=True)[1]
    seeds = np.unique(data.seeds, return_inverse=True)[1]
    rest = (data.variant, data.once, data.looped, data.loops, data.tokens, data.loss)
    return Arrays(data.variants, *rest, blocks, seeds)
