"""Scaling laws: L = E + A N^-alpha + B D^-beta, with N = N_once + r^phi N_loop and a phi for each variant.

phi is the worth of a loop: at 1 a model of r loops is as good as one with r times the layers, at 0 looping has no
effect (arXiv 2604.21106 finds 0.46). All variants share the rest of the law, so that runs of one loop serve each.

A study's fit is robust (Huber's weights), so that no single bad run decides it. Runs of one wiring, as in a sweep, have
no phi and equal weights, since the median of a few residuals is a poor estimate of their size. If their N (or D) does
not vary, its term cannot be separated from E and is left out. A fit needs two points more than coefficients, at
several sizes and token counts; otherwise it is refused.

Intervals are centered on the fit and stretched by Student's t over the normal, since few points leave the size of the
residuals uncertain.
"""

from __future__ import annotations

import dataclasses
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
    SAME,
    UNIT_D,
    UNIT_N,
    Arrays,
    Run,
    Solution,
    distinct,
    evaluate,
    jacobian,
    looped_variants,
    solve,
    to_arrays,
)

FARTHEST = 10.0  # factor beyond its runs up to which the law is trusted
_SPARE = 2  # a fit has at least this many more points than coefficients
_DISTINCT = 3  # distinct sizes, and distinct token counts, that their exponents need
_HUBER = 1.345  # standard deviations beyond which a residual counts less: 95 % efficient for normal errors
_ROUNDS = 12  # rounds of reweighting, at most
_TINY = 1e-12  # replaces a coefficient of 0 in logarithms
_REFITS = 2  # rounds of reweighting in a draw of the bootstrap
_LARGEST = 40.0  # exponent for which UNIT_D to its power is a number


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        theta: [5 + phis], E, A, B, alpha, beta, phis; A and B for sizes in `UNIT_N` and tokens in `UNIT_D`.
        weights: [n], Huber's; below 1 for runs that the law does not explain.
        residuals: [n], loss minus fitted loss.
        adjusted: [n], residuals at the size of the errors.
        samples: [b, 5 + phis], thetas of the bootstrap, stretched.
        notes: caveats for readers.
    """

    data: Arrays
    theta: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    adjusted: np.ndarray
    samples: np.ndarray
    cost: float
    notes: tuple[str, ...] = ()

    @property
    def rms_residual(self) -> float:
        return math.sqrt(float(np.mean(self.residuals**2)))

    @property
    def coefficients(self) -> dict[str, Interval]:
        """E, and alpha, beta, A and B of the terms in the law; A and B for N and D in single parameters and tokens."""
        has_n, has_d = self.data.terms
        e, a, b, alpha, beta = self._rows[:, :5].T
        # Runs that do not determine an exponent leave it at any size in a resampled fit.
        of_n = {"A": a * UNIT_N ** np.minimum(alpha, _LARGEST), "alpha": alpha}
        of_d = {"B": b * UNIT_D ** np.minimum(beta, _LARGEST), "beta": beta}
        columns = {"E": e} | (of_n if has_n else {}) | (of_d if has_d else {})
        return {name: self.interval(values) for name, values in columns.items()}

    @property
    def phis(self) -> dict[str, Interval]:
        return {name: self.interval(self._rows[:, self.phi_column(name)]) for name in self.data.variants}

    def phi_column(self, variant: str) -> int:
        return 5 + self.data.variants.index(variant)

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
        ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        return np.quantile(values, ends, axis=0, method="weibull")  # whatever the number of draws

    def fitted(self, runs: Sequence[Run]) -> np.ndarray:
        """Return the losses [m] of runs by the fit, however far from its own. Those of several loops have a phi."""
        return evaluate(self.theta[None], to_arrays(runs, self.data.variants))[0]

    def drawn(self, runs: Sequence[Run]) -> np.ndarray:
        """Return the losses [1 + b, m] of such runs by the fit, first, and by its samples."""
        return evaluate(self._rows, to_arrays(runs, self.data.variants))

    def predict(self, run: Run) -> Interval:
        """Predict a run's loss. Raises `UserError` for a run that is `beyond` the law's own."""
        beyond = self.beyond([run])
        if beyond:
            raise UserError(f"no prediction: {beyond}, where the law is not known to hold")
        return self.interval(self.drawn([run])[:, 0])

    def beyond(self, runs: Sequence[Run]) -> str:
        """Describe how far runs are outside of the law's own; empty within `FARTHEST` times them. Without a term of
        N (or D), the law holds only for the N (or D) of its runs."""
        return " and ".join(distance for distance, _ in self.outside(runs))

    def outside(self, runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
        """Yield how far runs are outside, and the nearest ones that would suffice, for sizes, tokens and loops."""
        data, asked = self.data, to_arrays(runs, tuple(dict.fromkeys(run.variant for run in runs)))
        sizes, tokens = ((each.once + each.looped, each.tokens) for each in (asked, data))
        for what, has, values, known in zip(("parameters", "tokens"), data.terms, sizes, tokens, strict=True):
            up, down = values.max() / known.max(), known.min() / values.min()
            if max(up, down) <= (FARTHEST if has else 1.001):
                continue
            if up >= down:
                yield f"{up:,.0f} times more {what} than any run has", f"at least {values.max() / FARTHEST:.3g} {what}"
            else:
                needed = f"at most {values.min() * FARTHEST:.3g} {what}"
                yield f"{down:,.0f} times fewer {what} than any run has", needed
        loops = max(run.loops for run in runs)
        if loops > data.loops.max():
            yield f"{loops} loops where runs have at most {int(data.loops.max())}", f"{loops} loops"


def fit_law(
    runs: Sequence[Run] | Arrays,
    *,
    variants: Sequence[str] | None = None,
    with_phi: bool = True,
    bootstraps: int = 400,
    seed: int = 0,
) -> LawFit:
    """Fit the law.

    Args:
        variants: order of the variants; None: that of the runs.
        with_phi: whether to fit loops; else all runs are of one wiring, with all parameters as `looped`, once.
        bootstraps: number of draws for the intervals; 0: none, and `samples` is empty.

    Raises `UserError` if the runs do not determine the law, or a loss is not a number.
    """
    if isinstance(runs, Arrays):
        data = runs
    else:
        found = looped_variants(runs) if with_phi else ()
        data = to_arrays(runs, [name for name in variants or found if name in found])
    problem = what_is_missing(data) if with_phi else _missing_without_phi(data)
    if problem:
        raise UserError(f"{'no law yet' if with_phi else 'no fit'}: {problem}")
    solution, weights, spread = _robust(data, _ROUNDS if with_phi else 0)
    residuals = data.loss - evaluate(solution.theta[None], data)[0]
    adjusted = adjusted_residuals(residuals, jacobian(solution.theta, data), weights, data)
    samples = np.empty((bootstraps, len(solution.theta)))
    errors = draw_errors(adjusted, data, bootstraps, np.random.default_rng(seed))
    for row, error in enumerate(errors):
        samples[row] = _refit(data, data.loss - residuals + error, solution, weights, spread)
    # Half: each coefficient depends on only a part of the blocks, a variant's phi on its own and those of one loop.
    degrees = max(3, (int(data.blocks.max()) + 1 - data.coefficients) // 2)
    samples = _stretched(samples, solution.theta, stretch(degrees))
    notes = tuple(_notes(data, solution.theta, weights))
    return LawFit(data, solution.theta, weights, residuals, adjusted, samples, solution.cost, notes)


def what_is_missing(data: Arrays) -> str | None:
    """Describe the runs that a law with phis lacks; None if it lacks none."""
    if not data.variants:
        return "no finished run has several loops, so phi is unknown"
    if not (data.loops == 1).any():
        return "no finished run has one loop, which every variant is measured against"
    for place, name in enumerate(data.variants):
        if not ((data.variant == place) & (data.loops > 1)).any():
            return f"no finished run of {name} has several loops"
    for values, name in ((data.looped, "sizes"), (data.tokens, "numbers of tokens")):
        count = distinct(values)
        if count < _DISTINCT:
            return f"{count} {name}; an exponent needs at least {_DISTINCT}"
    return _too_few(data, "finished runs")


def _missing_without_phi(data: Arrays) -> str | None:
    for values, name in ((data.looped, "model sizes"), (data.tokens, "token budgets")):
        count = distinct(values)
        if 1 < count < _DISTINCT:
            return f"{count} {name}; an exponent needs at least {_DISTINCT}, or one to leave it out"
    if not any(data.terms):
        return "one model size and one token budget; a scaling law needs at least three of either"
    return _too_few(data, "points")


def _too_few(data: Arrays, what: str) -> str | None:
    """Describe why there are too few runs for the coefficients, or too few of other sizes, loops or tokens: further
    seeds determine none."""
    coefficients, least = data.coefficients, data.coefficients + _SPARE
    if data.n < least:
        return f"{data.n} {what} for {coefficients} coefficients; at least {least} are needed"
    distinct = np.unique([data.variant, data.once, data.looped, data.loops, data.tokens], axis=1).shape[1]
    if distinct < coefficients:
        return f"{distinct} models and budgets for {coefficients} coefficients, whatever the seeds: add others"
    return None


def _robust(data: Arrays, rounds: int) -> tuple[Solution, np.ndarray, float]:
    """Return the fit, its Huber weights (all 1 for 0 `rounds`), and the standard deviation they are based on."""
    weights, spread = np.ones(data.n), 0.0
    solution = solve(data, data.loss, weights)
    for _ in range(rounds):
        residuals = data.loss - evaluate(solution.theta[None], data)[0]
        spread = float(np.median(np.abs(residuals))) / NormalDist().inv_cdf(0.75)
        spread *= math.sqrt(data.n / (data.n - data.coefficients))
        new = _weights(residuals, spread)
        if np.allclose(new, weights, atol=1e-3):
            break
        weights = new
        solution = solve(data, data.loss, weights, start=solution.shape)
    return solution, weights, spread


def _refit(data: Arrays, losses: np.ndarray, found: Solution, weights: np.ndarray, spread: float) -> np.ndarray:
    """Return theta for other losses, with weights of their own: with the fit's, intervals would be too narrow."""
    for _ in range(_REFITS):
        solution = solve(data, losses, weights, start=found.shape)
        weights = _weights(losses - evaluate(solution.theta[None], data)[0], spread)
    return solve(data, losses, weights, start=solution.shape).theta


def _weights(residuals: np.ndarray, spread: float) -> np.ndarray:
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


def _notes(data: Arrays, theta: np.ndarray, weights: np.ndarray) -> Iterator[str]:
    names = ("one model size: the term of N is part of E", "one token budget: the term of D is part of E")
    yield from (text for text, has in zip(names, data.terms, strict=True) if not has)
    exponents, phis = (1.05 * EXPONENTS[0], 0.95 * EXPONENTS[1]), (PHIS[0] + 0.1, PHIS[1] - 0.1)
    shape = {"alpha": exponents if data.terms[0] else None, "beta": exponents if data.terms[1] else None}
    shape |= {f"phi of {variant}": phis for variant in data.variants}
    for value, (name, ends) in zip(theta[3:], shape.items(), strict=True):
        if ends is not None and not ends[0] < value < ends[1]:
            yield f"{name} is at the edge of the range searched: the runs do not determine it"
    for name, value, has in zip(("E", "A", "B"), theta[:3], (True, *data.terms), strict=True):
        if has and value == 0:
            yield f"{name} is 0: the runs do not show its term"
    few = int((weights < 0.5).sum())
    if few:
        yield f"{few} of {data.n} runs are far from the law and count less than half"


# ---------------------------------------------------------------- questions to a fitted law


@dataclass(frozen=True)
class HeldOut:
    """Predictions of held-out runs [m]: their losses seen and predicted (`said`), and how many are `inside` the law's
    intervals, which do not include a run's noise."""

    seen: np.ndarray
    said: np.ndarray
    inside: int


def profile(fit: LawFit, variant: str, points: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Return values [k] of the variant's phi around the fit's, and how much worse the best law with each fits: the
    relative excess of squares [k]."""
    column = fit.phi_column(variant)
    center, spread = fit.theta[column], max(float(np.std(fit.samples[:, column])), 1e-3)
    values = center + np.linspace(-4, 4, points) * spread
    fits = [solve(fit.data, fit.data.loss, fit.weights, fit.theta[3:], {column - 3: float(value)}) for value in values]
    return values, np.array([found.cost for found in fits]) / max(fit.cost, 1e-300) - 1


def equal_phis(fit: LawFit, variants: Sequence[str], draws: int = 200) -> float:
    """Test whether variants of the law have one phi, by the bootstrap of a law in which they do.

    Returns the p-value: how often chance alone makes separate phis fit as much better, if they are equal.
    """
    data, equal = fit.data, _joined(fit.data, variants)
    restricted = solve(equal, data.loss, fit.weights)
    fitted = evaluate(restricted.theta[None], equal)[0]

    def gain(losses: np.ndarray) -> float:
        one = solve(equal, losses, fit.weights, restricted.shape).cost
        each = solve(data, losses, fit.weights, fit.theta[3:]).cost
        return one / max(each, 1e-300) - 1

    errors = draw_errors(fit.adjusted, data, draws, np.random.default_rng(0))
    statistic = gain(data.loss)
    larger = sum(gain(fitted + error) >= statistic for error in errors)
    return (larger + 1) / (draws + 1)


def hold_out_largest(fit: LawFit, bootstraps: int = 100) -> HeldOut:
    """Predict the largest size from the others.

    Raises `UserError` if the others do not determine a law.
    """
    data = fit.data
    is_largest = data.looped >= (1 - SAME) * data.looped.max()  # variants of one size differ by their gates
    smaller = fit_law(data.subset(~is_largest), bootstraps=bootstraps)
    asked = data.subset(is_largest)
    said = evaluate(smaller.theta[None], asked)[0]
    low, high = fit.bounds(evaluate(smaller.samples, asked))
    return HeldOut(asked.loss, said, int(((low <= asked.loss) & (asked.loss <= high)).sum()))


def _joined(data: Arrays, variants: Sequence[str]) -> Arrays:
    """Return the same runs with `variants` as one variant, the first of them."""
    first = next(name for name in data.variants if name in variants)
    names = [name for name in data.variants if name == first or name not in variants]
    places = np.array([names.index(first if name in variants else name) for name in data.variants])
    return dataclasses.replace(data, variants=tuple(names), variant=places[data.variant])
