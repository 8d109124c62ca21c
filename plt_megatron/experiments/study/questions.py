"""Questions to a fitted law: how sharply the runs speak about phi, whether variants share one, and how it foretells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plt_megatron.errors import UserError
from plt_megatron.experiments.intervals import draw_errors
from plt_megatron.experiments.law import SAME, LawFit, fit_law
from plt_megatron.experiments.solver import Arrays, evaluate, solve


@dataclass(frozen=True)
class Profile:
    """A variant's phi [k] held at values, and how much worse the best law with it fits: squares over the fit's, [k]."""

    variant: str
    phi: np.ndarray
    excess: np.ndarray


@dataclass(frozen=True)
class NestedTest:
    """Are phis equal? `p`: how often luck alone makes the law with separate phis fit so much better, if they are."""

    variants: tuple[str, ...]
    statistic: float
    p: float

    @property
    def text(self) -> str:
        """In words."""
        names = " and ".join(self.variants)
        p = "p < 0.01" if self.p < 0.01 else f"p = {self.p:.2f}"
        return f"phi of {names}: {'different' if self.p < 0.05 else 'not told apart'} ({p})"


@dataclass(frozen=True)
class HeldOut:
    """Runs that the law had not seen, and what it had said of them: rows [m] of the data, losses, intervals."""

    rows: np.ndarray
    seen: np.ndarray
    said: np.ndarray
    low: np.ndarray
    high: np.ndarray
    what: str

    @property
    def inside(self) -> int:
        """How many lie within their interval, which is the law's own, without a run's luck."""
        return int(((self.low <= self.seen) & (self.seen <= self.high)).sum())


def profile(fit: LawFit, variant: str, points: int = 25) -> Profile:
    """Hold the variant's phi at values around the fit's, and fit the rest."""
    column = fit.phi_column(variant)
    center, spread = fit.theta[column], max(float(np.std(fit.samples[:, column])), 1e-3)
    values = center + np.linspace(-4, 4, points) * spread
    costs = []
    for value in values:
        found = solve(fit.data, fit.groups, fit.data.loss, fit.weights, fit.theta[3:], {column - 3: float(value)})
        costs.append(found.cost)
    return Profile(variant, values, np.array(costs) / max(fit.cost, 1e-300) - 1)


def equal_phis(fit: LawFit, variants: Sequence[str], draws: int = 200, seed: int = 0) -> NestedTest:
    """Whether the variants have one phi, by the bootstrap of a law in which they do.

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
    """Foretell the largest size from the others.

    Raises:
        UserError: the others do not determine a law.
    """
    data = fit.data
    is_largest = data.looped >= (1 - SAME) * data.looped.max()  # variants of one size differ in gates
    what = "the largest size"
    rest = _renumbered(data.subset(~is_largest))
    smaller = fit_law(rest, bootstraps=bootstraps, level=fit.level)
    asked = data.subset(is_largest)
    said = evaluate(smaller.theta[None], asked, smaller.groups)[0]
    samples = evaluate(smaller.samples, asked, smaller.groups)
    low, high = fit.bounds(samples)
    return HeldOut(np.flatnonzero(is_largest), asked.loss, said, low, high, what)


def _joined(fit: LawFit, variants: Sequence[str]) -> np.ndarray:
    """Groups [variants] in which the given ones share a phi."""
    columns = {fit.phi_column(name) for name in variants}
    first = min(columns)
    merged = [first if 5 + group in columns else 5 + group for group in fit.groups]
    order = sorted(set(merged))
    return np.array([order.index(column) for column in merged])


def _renumbered(data: Arrays) -> Arrays:
    """Blocks and seeds counted from 0 without gaps."""
    blocks = np.unique(data.blocks, return_inverse=True)[1]
    seeds = np.unique(data.seeds, return_inverse=True)[1]
    rest = (data.variant, data.once, data.looped, data.loops, data.tokens, data.loss)
    return Arrays(data.variants, *rest, blocks, seeds)
