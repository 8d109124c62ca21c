"""Scaling laws: L = E + A N^-alpha + B D^-beta, with N = N_once + r^phi N_loop and a phi for each variant.

phi says what a loop is worth: at 1 a model of r loops is as good as one of r times the layers, at 0 looping is for
nothing (arXiv 2604.21106 finds 0.46). All variants share the rest of the law, so that runs of one loop serve each.

`fit_law` is of a study, robustly (Huber's weights): one run that went wrong does not decide. `fit_curve` is of the rows
of a sweep, of one wiring each: without phi, by plain least squares, its intervals by a residual bootstrap. Where N (or
D) does not vary there, its term cannot be told from E and is left out. A fit needs more points than it has
coefficients, at several sizes and token counts: where they are missing it is refused, not guessed.

Intervals are centered on the fit and stretched by Student's t over the normal, since few points leave the size of the
residuals uncertain: without it, nine points' 95 % intervals hold the truth 86 times in 100 instead of 93.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

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
    evaluate,
    jacobian,
    looped_variants,
    models_to_arrays,
    solve,
    to_arrays,
)

FARTHEST = 10.0  # how many times beyond its runs the law is trusted without a word
_SPARE = 2  # a fit has at least so many more points than coefficients
_DISTINCT = 3  # distinct sizes, and distinct tokens, that their exponents take
SAME = 0.05  # relative: nearer sizes are one
_HUBER = 1.345  # standard deviations beyond which a residual counts less: 95 % efficient for normal errors
_ROUNDS = 12  # of reweighting, at most
_TINY = 1e-12  # stands for a coefficient of 0 where logarithms are taken
_LEAST = math.exp(-14)  # the same in `fit_curve`, where E is stretched by its logarithm, too
_REFITS = 2  # of reweighting in a draw of the bootstrap


@dataclass(frozen=True)
class Prediction:
    """A loss, its interval, and what has to be said with it: nothing within ten times the law's runs."""

    loss: Interval
    beyond: str = ""


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        groups: [variants], the phi that each variant has: one each, unless they were asked to be equal.
        theta: [5 + phis], E, A, B, alpha, beta, phis; A and B for sizes in `UNIT_N` and tokens in `UNIT_D`.
        weights: [n], Huber's; below 1 for runs that the law does not explain.
        residuals: [n], loss less fitted loss.
        adjusted: [n], the same at the size of errors.
        samples: [b, 5 + phis], thetas of other draws of luck, stretched.
        notes: what readers must know.
        terms: whether there are terms of N and of D.
        quantiles: numpy's name of how an interval's ends lie between two samples. weibull: as it is for draws of any
            number, not only for very many.
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
    terms: tuple[bool, bool] = (True, True)
    quantiles: Literal["weibull", "linear"] = "weibull"

    @property
    def rms_residual(self) -> float:
        return math.sqrt(float(np.mean(self.residuals**2)))

    @property
    def coefficients(self) -> dict[str, Interval]:
        """E, alpha, beta, and A and B for sizes in parameters and tokens one by one; of the terms that there are."""
        has_n, has_d = self.terms
        names = ("E", *(("A", "alpha") if has_n else ()), *(("B", "beta") if has_d else ()))
        return {name: self.interval(_natural(self._rows, name)) for name in names}

    @property
    def phis(self) -> dict[str, Interval]:
        """By variant."""
        return {name: self.interval(self._rows[:, self.phi_column(name)]) for name in self.data.variants}

    def phi_column(self, variant: str) -> int:
        """Where the variant's phi is in theta."""
        return 5 + int(self.groups[self.data.variants.index(variant)])

    def difference(self, variant: str, reference: str) -> Interval:
        """phi of the one less phi of the other."""
        return self.interval(self._rows[:, self.phi_column(variant)] - self._rows[:, self.phi_column(reference)])

    @property
    def _rows(self) -> np.ndarray:
        return np.vstack([self.theta, self.samples])

    def interval(self, values: np.ndarray) -> Interval:
        """The interval of a quantity [1 + b], given for the fit first and then for each sample."""
        low, high = self.bounds(values[1:])
        return Interval(float(values[0]), float(low), float(high))

    def bounds(self, values: np.ndarray) -> np.ndarray:
        """Both ends [2, ...] of the interval of quantities [b, ...] by the samples."""
        ends = [(1 - self.level) / 2, (1 + self.level) / 2]
        return np.quantile(values, ends, axis=0, method=self.quantiles)

    def fitted(self, models: Sequence[Model]) -> np.ndarray:
        """Losses [m] of models by the fit, however far they are from its runs. Raises `UserError` as `drawn` does."""
        return evaluate(self.theta[None], self._asked(models), self.groups)[0]

    def drawn(self, models: Sequence[Model]) -> np.ndarray:
        """Losses [1 + b, m] by the fit, first, and by its samples.

        Raises:
            UserError: a model with several loops is of a variant without a phi.
        """
        return evaluate(self._rows, self._asked(models), self.groups)

    def _asked(self, models: Sequence[Model]) -> Arrays:
        unknown = sorted({m.variant for m in models if m.loops > 1} - set(self.data.variants))
        if unknown:
            raise UserError(f"the law has no phi for {', '.join(unknown)}: no finished run of it has several loops")
        return models_to_arrays(models, self.data.variants)

    def predict(self, model: Model, *, far: bool = False) -> Prediction:
        """The law's loss.

        Args:
            far: predict beyond ten times the runs, too: the answer then says how far that is.

        Raises:
            UserError: without `far`, what is asked about is farther than that from the law's runs.
        """
        beyond = self.beyond([model])
        if beyond and not far:
            raise UserError(f"no prediction: {beyond}, where the law is not known to hold")
        return Prediction(self.interval(self.drawn([model])[:, 0]), beyond)

    def beyond(self, models: Sequence[Model]) -> str:
        """In words, how far models are outside of the law's runs; empty within `FARTHEST` times them. A term that the
        law has not got is not known anywhere else."""
        return " and ".join(distance for distance, _ in self._outside(models))

    def needed(self, models: Sequence[Model]) -> str:
        """In words, the runs with which models would not be `beyond`; empty if they are not."""
        runs = " and ".join(bound for _, bound in self._outside(models))
        return f"runs of {runs}" if runs else ""

    def _outside(self, models: Sequence[Model]) -> Iterator[tuple[str, str]]:
        """How far models are outside, and the nearest runs that would do, for sizes, tokens and loops."""
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
    equal: bool = False,
    bootstraps: int = 400,
    level: float = LEVEL,
    seed: int = 0,
) -> LawFit:
    """Fit the law.

    Args:
        variants: their order; None: as they come.
        equal: one phi for all variants.
        bootstraps: how many draws the intervals come from; 0: none, and `samples` is empty.

    Raises:
        UserError: the observations do not determine the law.
    """
    if not isinstance(observations, Arrays):
        found = looped_variants(observations)
        observations = to_arrays(observations, [name for name in variants or found if name in found])
    data = observations
    groups = np.zeros(len(data.variants), dtype=int) if equal else np.arange(len(data.variants))
    problem = what_is_missing(data, groups)
    if problem:
        raise UserError(f"no law yet: {problem}")
    solution, weights, spread = _robust(data, groups)
    residuals = data.loss - evaluate(solution.theta[None], data, groups)[0]
    adjusted = adjusted_residuals(residuals, jacobian(solution.theta, data, groups), weights, data)
    samples = np.empty((bootstraps, len(solution.theta)))
    errors = draw_errors(adjusted, data, bootstraps, np.random.default_rng(seed))
    for row, error in enumerate(errors):
        samples[row] = _refit(data, groups, data.loss - residuals + error, solution, weights, spread)
    # Half: each coefficient is told by a part of the blocks only, phi of a variant by its own and those of one loop.
    degrees = max(3, (int(data.blocks.max()) + 1 - len(solution.theta)) // 2)
    samples = _stretched(samples, solution.theta, stretch(level, degrees), 1)
    notes = tuple(_notes(data, groups, solution.theta, weights))
    return LawFit(data, groups, solution.theta, weights, residuals, adjusted, samples, solution.cost, level, notes)


def fit_curve(points: Sequence[Observation], *, bootstraps: int = 400, level: float = LEVEL, seed: int = 0) -> LawFit:
    """Fit a law without phi to runs of one wiring, whose `looped` holds all parameters and whose `loops` is 1.

    Raises `UserError` if there are too few points, sizes or token counts for it, or a loss is no number.
    """
    data = to_arrays(points, ())
    terms, notes = _terms(data)
    one, none = np.ones(data.n), np.arange(0)
    found = solve(data, none, data.loss, one, terms=terms)
    residuals = data.loss - evaluate(found.theta[None], data, none)[0]
    spare = data.n - (1 + 2 * sum(terms))
    drawn = np.random.default_rng(seed).choice(residuals * math.sqrt(data.n / spare), size=(bootstraps, data.n))
    refits = [solve(data, none, row, one, found.shape, terms=terms).theta for row in data.loss - residuals + drawn]
    thetas = np.array([found.theta, *refits])
    there = np.flatnonzero([True, *terms])
    thetas[:, there] = np.maximum(thetas[:, there], _LEAST)
    theta, samples = thetas[0], _stretched(thetas[1:], thetas[0], stretch(level, spare), 0)
    notes += [text for text, has in zip(_edges(theta), terms, strict=True) if has and text]
    notes += [f"{'EAB'[place]} is 0: the points do not show its term" for place in there if found.theta[place] == 0]
    fit = LawFit(data, none, theta, one, residuals, residuals, samples, found.cost, level, tuple(notes), terms)
    return dataclasses.replace(fit, quantiles="linear")


def _terms(data: Arrays) -> tuple[tuple[bool, bool], list[str]]:
    """The terms of N and D that the points determine, and what is to be said of others. Raises `UserError` if they
    determine too few."""
    sizes, budgets = len(np.unique(data.looped)), len(np.unique(data.tokens))
    for count, name in ((sizes, "model sizes"), (budgets, "token budgets")):
        if 1 < count < _DISTINCT:
            raise UserError(f"no fit: {count} {name}; an exponent takes at least {_DISTINCT}, or one to leave it out")
    if sizes == budgets == 1:
        raise UserError("no fit: one model size and one token budget; a scaling law needs at least three of either")
    terms = (sizes > 1, budgets > 1)
    least = 1 + 2 * sum(terms) + _SPARE
    if data.n < least:
        raise UserError(f"no fit: {data.n} points for {least - _SPARE} coefficients; it takes {least} at least")
    names = ("one model size: the term of N is part of E", "one token budget: the term of D is part of E")
    return terms, [name for name, has in zip(names, terms, strict=True) if not has]


def what_is_missing(data: Arrays, groups: np.ndarray) -> str | None:
    """What the law lacks, in words; None: nothing. `groups`: see `LawFit`."""
    if not data.variants:
        return "no finished run has several loops, so nothing is said about phi"
    if not (data.loops == 1).any():
        return "no finished run has one loop, which every variant is measured against"
    for values, name in ((data.looped, "sizes"), (data.tokens, "numbers of tokens")):
        # Variants of one size differ in gates: such sizes are one.
        count = 1 + int((np.diff(np.sort(np.log(values))) > SAME).sum())
        if count < _DISTINCT:
            return f"{count} {name}; an exponent takes at least {_DISTINCT}"
    coefficients = 5 + int(groups.max()) + 1
    if data.n < coefficients + _SPARE:
        return f"{data.n} finished runs for {coefficients} coefficients; it takes {coefficients + _SPARE} at least"
    return None


def _robust(data: Arrays, groups: np.ndarray) -> tuple[Solution, np.ndarray, float]:
    """The fit, Huber's weights that it agrees with, and the standard deviation that they go by."""
    weights, spread = np.ones(data.n), 0.0
    solution = solve(data, groups, data.loss, weights)
    for _ in range(_ROUNDS):
        residuals = data.loss - evaluate(solution.theta[None], data, groups)[0]
        spread = float(np.median(np.abs(residuals))) / NormalDist().inv_cdf(0.75)
        spread *= math.sqrt(data.n / (data.n - len(solution.theta)))
        new = _weights(residuals, spread)
        if np.allclose(new, weights, atol=1e-3):
            break
        weights = new
        solution = solve(data, groups, data.loss, weights, start=solution.shape)
    return solution, weights, spread


def _refit(
    data: Arrays, groups: np.ndarray, losses: np.ndarray, found: Solution, weights: np.ndarray, spread: float
) -> np.ndarray:
    """Theta of other losses. Their weights are their own: with the fit's, intervals would be too narrow."""
    for _ in range(_REFITS):
        solution = solve(data, groups, losses, weights, start=found.shape)
        weights = _weights(losses - evaluate(solution.theta[None], data, groups)[0], spread)
    return solve(data, groups, losses, weights, start=solution.shape).theta


def _weights(residuals: np.ndarray, spread: float) -> np.ndarray:
    """Huber's; losses without noise have none to be weighed by."""
    if spread < 1e-12:
        return np.ones(len(residuals))
    return np.minimum(1.0, _HUBER * spread / np.maximum(np.abs(residuals), 1e-300))


def _stretched(samples: np.ndarray, theta: np.ndarray, factor: float, first: int) -> np.ndarray:
    """Samples moved away from the fit; coefficients from `first` up to beta by their logarithms: they are positive."""
    moved = theta + (samples - theta) * factor
    moved[:, 0] = np.maximum(moved[:, 0], 0.0)
    center, drawn = (np.log(np.maximum(values, _TINY)) for values in (theta[first:5], samples[:, first:5]))
    moved[:, first:5] = np.exp(np.clip(center + factor * (drawn - center), -50, 50))
    return moved


def _edges(theta: np.ndarray) -> list[str]:
    """For alpha and beta, that it is at the edge of what was searched; empty where it is not."""
    return [
        ""
        if 1.05 * EXPONENTS[0] < value < 0.95 * EXPONENTS[1]
        else f"{name} is at the edge of what was searched: the runs do not determine it"
        for name, value in (("alpha", theta[3]), ("beta", theta[4]))
    ]


def _notes(data: Arrays, groups: np.ndarray, theta: np.ndarray, weights: np.ndarray) -> list[str]:
    notes = [text for text in _edges(theta) if text]
    for index, name in enumerate(data.variants):
        if not PHIS[0] + 0.1 < theta[5 + groups[index]] < PHIS[1] - 0.1:
            notes.append(f"phi of {name} is at the edge of what was searched: the runs do not determine it")
    for name, value in zip(("E", "A", "B"), theta[:3], strict=True):
        if value == 0:
            notes.append(f"{name} is 0: the runs do not show its term")
    low = int((weights < 0.5).sum())
    if low:
        notes.append(f"{low} of {data.n} runs are far from the law and count less than half")
    return notes


def _natural(theta: np.ndarray, name: str) -> np.ndarray:
    """A coefficient's column of theta [b, p] for sizes in parameters and tokens one by one."""
    if name == "A":
        return theta[:, 1] * UNIT_N ** theta[:, 3]
    if name == "B":
        return theta[:, 2] * UNIT_D ** theta[:, 4]
    return theta[:, {"E": 0, "alpha": 3, "beta": 4}[name]]
