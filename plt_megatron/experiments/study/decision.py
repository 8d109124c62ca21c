"""Decide how many loops are best at equal training FLOPs, step time, decoding latency or memory, and how sure that is.

Each contender (a variant with a number of loops) comes in many shapes. At a given price, its best shape within the
limit counts: large and trained briefly, or small and trained long. Its loss is predicted by the law. The share of the
law's bootstrap samples in which a contender is best tells how sure the answer is, if the law holds. Where it is not
known to hold (far beyond its runs, or where its intervals are wider than its own E), nothing is decided.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from plt_megatron.experiments.files import DecideSettings
from plt_megatron.experiments.intervals import Interval
from plt_megatron.experiments.law import LawFit
from plt_megatron.experiments.pages import Verdict
from plt_megatron.experiments.solver import Run, Shape, jacobian, to_arrays
from plt_megatron.run_folder.text import format_bytes, format_duration, plural

_POINTS = 25  # points of a frontier's curve
_SPAN = 30.0  # factor by which it extends from the target in both directions


@dataclass(frozen=True)
class Candidate(Shape):
    """A model that could be trained.

    Attributes:
        flops, seconds: cost of training per token; seconds None: not measured.
        latency_ms: latency per decoded token; memory: bytes of weights and KV cache; both at the target's context and
            batch.
    """

    flops: float
    seconds: float | None
    latency_ms: float
    memory: float


@dataclass(frozen=True)
class Curve:
    """A contender's frontier: price or limit x [k], loss [k] (NaN: no candidate within the limit), and its interval."""

    variant: str
    loops: int
    x: np.ndarray
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Standing:
    """A contender at the target, with the training of its best shape, `run`.

    Attributes:
        behind: its loss minus the best contender's.
        share: share of the samples in which it is the best.
    """

    run: Run
    loss: Interval
    behind: Interval
    share: float

    @property
    def best_in(self) -> str:
        """The share in percent, rounded down: it never reads as a confidence that it does not reach."""
        return f"{math.floor(100 * self.share + 1e-9)}%"


@dataclass(frozen=True)
class LawVerdict(Verdict):
    """The answer for one variant, the `group`.

    It is decided if the law is known to hold at the target, and the best contender's share reaches the target's
    confidence or the difference is below `indifference`; else `text` says what would decide it.

    Attributes:
        standings: contenders, best first; empty if no contender is within the limits, or the fit has no phi of the
            variant.
        beyond: how far the answer lies from the law's runs, in words; empty if near them.
    """

    standings: tuple[Standing, ...] = ()
    beyond: str = ""


@dataclass(frozen=True)
class Frontier:
    """One question's curves and verdicts, by variant. `axis`: the quantity x."""

    question: str
    axis: str
    curves: tuple[Curve, ...]
    verdicts: tuple[LawVerdict, ...]


def decide(
    fit: LawFit,
    candidates: Sequence[Candidate],
    target: DecideSettings,
    unit: str = "nats per token",
    *,
    curves: bool = True,
) -> list[Frontier]:
    """Return all frontiers, with the headline, at equal decoding latency, first.

    Verdicts cover the candidates' variants in their order, including those without a phi in the fit. `unit`: unit of
    the loss; `curves`: whether to compute losses away from the target, too.
    """
    return [_frontier(fit, candidates, question, target, curves) for question in _questions(candidates, target, unit)]


def headline(frontiers: Sequence[Frontier]) -> LawVerdict:
    """Return the first variant's answer at equal decoding latency."""
    return frontiers[0].verdicts[0]


@dataclass(frozen=True)
class _Question:
    """A quantity to hold equal.

    Attributes:
        unit: unit of the loss.
        name, axis, words: the quantity, short, as an axis and in a sentence.
        quantity: attribute of candidates that is held equal.
        target: its value, in total for a price of training.
        budget: training FLOPs if the quantity is a limit; None: it is the price of a token.
    """

    unit: str
    name: str
    axis: str
    words: str
    quantity: str
    target: float
    budget: float | None = None

    def measure(self, candidate: Candidate) -> float:
        return float(getattr(candidate, self.quantity))

    def tokens(self, candidate: Candidate, value: float) -> float:
        """Return the training tokens at a value of the axis."""
        return self.budget / candidate.flops if self.budget is not None else value / self.measure(candidate)


def _questions(candidates: Sequence[Candidate], target: DecideSettings, unit: str) -> list[_Question]:
    budget, memory, latency = target.training_flops, 1e9 * target.memory_gb, target.latency_ms
    price = f"at {budget:.3g} training FLOPs"
    words = f"{price} and {latency:.3g} ms a token"
    by_latency = _Question(
        unit, "decoding latency", "milliseconds per decoded token", words, "latency_ms", latency, budget
    )
    words = f"{price} and {format_bytes(memory)} of weights and KV cache"
    by_memory = _Question(unit, "memory", "bytes of weights and KV cache", words, "memory", memory, budget)
    questions = [by_latency, by_memory, _Question(unit, "training FLOPs", "training FLOPs", price, "flops", budget)]
    if all(candidate.seconds is not None for candidate in candidates):
        single = [c.seconds / c.flops for c in candidates if c.loops == 1 and c.seconds is not None]
        seconds = budget * float(np.median(single))
        words = f"at {format_duration(seconds)} of training, at the speed measured"
        questions.append(_Question(unit, "step time", "seconds of training", words, "seconds", seconds))
    return questions


def _frontier(
    fit: LawFit, candidates: Sequence[Candidate], question: _Question, target: DecideSettings, with_curves: bool
) -> Frontier:
    values = question.target * np.geomspace(1 / _SPAN, _SPAN, _POINTS)
    contenders = _contenders(fit, candidates)
    curves = tuple(_curve(fit, own, question, values) for own in contenders.values()) if with_curves else ()
    variants = list(dict.fromkeys(candidate.variant for candidate in candidates if candidate.loops > 1))
    verdicts = []
    for variant in variants:
        own = [found for (name, loops), found in contenders.items() if name == variant or loops == 1]
        words = f"{variant} {question.words}" if len(variants) > 1 else question.words
        verdicts.append(_verdict(fit, own, dataclasses.replace(question, words=words), target, variant))
    return Frontier(question.name, question.axis, curves, tuple(verdicts))


def _contenders(fit: LawFit, candidates: Sequence[Candidate]) -> dict[tuple[str, int], list[Candidate]]:
    """Group candidates by variant and loops; those of one loop belong to every variant."""
    found: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in candidates:
        if candidate.loops == 1 or candidate.variant in fit.data.variants:
            found.setdefault((candidate.variant, candidate.loops), []).append(candidate)
    return found


def _best(fit: LawFit, own: Sequence[Candidate], question: _Question, value: float) -> tuple[Run, np.ndarray] | None:
    """Return the training of a contender's best candidate at a value of the axis, and its loss [1 + b] by the fit and
    its samples; None if no candidate is within the limit.

    The fit chooses the shape: samples evaluate that choice, not one made with hindsight.
    """
    inside = _within(own, question.measure, value) if question.budget is not None else list(own)
    if not inside:
        return None
    runs = [candidate.trained(question.tokens(candidate, value)) for candidate in inside]
    best = runs[int(np.argmin(fit.fitted(runs)))]
    return best, fit.drawn([best])[:, 0]


def _within(own: Sequence[Candidate], measure: Callable[[Candidate], float], limit: float) -> list[Candidate]:
    """Return the candidates up to a limit, and an interpolated one right at it: else a contender whose next shape is
    just too large would lose by the gap between shapes."""
    inside = [c for c in own if measure(c) <= limit * (1 + 1e-9)]
    beyond = [c for c in own if measure(c) > limit * (1 + 1e-9)]
    if inside and beyond:
        low, high = max(inside, key=measure), min(beyond, key=measure)
        share = math.log(limit / measure(low)) / math.log(measure(high) / measure(low))
        inside.append(_between(low, high, share))
    return inside


def _between(low: Candidate, high: Candidate, share: float) -> Candidate:
    """Interpolate between two candidates of one contender, in logarithms."""
    values = {}
    for name in ("once", "looped", "flops", "seconds", "latency_ms", "memory"):
        first, last = getattr(low, name), getattr(high, name)
        values[name] = first * (last / first) ** share if first else first
    return dataclasses.replace(low, **values)


def _curve(fit: LawFit, own: Sequence[Candidate], question: _Question, values: np.ndarray) -> Curve:
    rows = np.full((3, len(values)), np.nan)
    for place, value in enumerate(values):
        found = _best(fit, own, question, float(value))
        if found is not None:
            rows[:, place] = found[1][0], *fit.bounds(found[1][1:])
    return Curve(own[0].variant, own[0].loops, values, *rows)


def _verdict(
    fit: LawFit, contenders: Sequence[Sequence[Candidate]], question: _Question, target: DecideSettings, variant: str
) -> LawVerdict:
    if variant not in fit.data.variants:
        text = f"{question.words}: no run with several loops counts, so nothing is known about them. Not decided"
        return LawVerdict(text, False, question.name, variant)
    best = [_best(fit, own, question, question.target) for own in contenders]
    inside = sorted((found for found in best if found is not None), key=lambda found: found[1][0])
    if not inside:
        text = f"{question.words}: no shape considered is within the limit"
        return LawVerdict(text, False, question.name, variant)
    losses = np.stack([own for _, own in inside])  # [contenders, 1 + b]
    wins = np.bincount(np.argmin(losses[:, 1:], axis=0), minlength=len(inside)) / (losses.shape[1] - 1)
    standings = tuple(
        Standing(run, fit.interval(own), fit.interval(own - losses[0]), float(share))
        for (run, own), share in zip(inside, wins, strict=True)
    )
    return _in_words(fit, question, variant, standings, target)


def _in_words(
    fit: LawFit, question: _Question, variant: str, standings: tuple[Standing, ...], target: DecideSettings
) -> LawVerdict:
    best, others = standings[0], standings[1:]
    text = f"{question.words}: {_loops(best)}, {best.best_in}"
    if others:
        second = others[0]
        text += f"; {_loops(second)} {second.behind.text('+.4f')} {question.unit}, {second.best_in}"
    near = [other for other in others if other.behind.high < target.indifference]
    beyond = fit.beyond([standing.run for standing in standings])
    doubts = list(_doubts(fit, standings, question.unit))
    if not doubts and best.share < target.confidence and len(near) < len(others):
        doubts = [(f"{target.confidence:.0%} is asked for", "further runs near it")]
    if doubts:
        reasons, needs = (" and ".join(words) for words in zip(*doubts, strict=True))
        text += f". Not decided: {reasons}; it takes {needs}"
    elif best.share < target.confidence:
        text += f". The difference to {', '.join(map(_loops, near))} is too small to matter"
    winner = None if doubts else _loops(best)
    return LawVerdict(text, not doubts, question.name, variant, winner, standings, beyond)


def _doubts(fit: LawFit, standings: Sequence[Standing], unit: str) -> Iterator[tuple[str, str]]:
    """Yield the reasons why the law is not known to hold at the target, each with what would remove it."""
    runs = [standing.run for standing in standings]
    outside, floor = list(fit.outside(runs)), float(fit.theta[0]) or standings[0].loss.value
    if outside:
        distances, bounds = (" and ".join(words) for words in zip(*outside, strict=True))
        yield f"this extrapolates the law far, {distances}", f"runs of {bounds}"
    width = max((standing.behind.high - standing.behind.low for standing in standings[1:2]), default=0.0)
    if width > floor:
        words = f"an interval of {width:.3g} {unit} is wider than the law's E, {floor:.3g}"
        yield words, "more runs, of other sizes and tokens, for the law itself"


_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def _loops(standing: Standing) -> str:
    """Write its number of loops in words: `two loops`."""
    count = standing.run.loops
    return plural(count, "loop").replace(str(count), _NUMBERS[count])


def contrast(fit: LawFit, verdict: LawVerdict) -> np.ndarray | None:
    """Return the gradient [1, p] of the difference between the two best, which further runs should determine; None if
    there is only one."""
    if len(verdict.standings) < 2:
        return None
    rows = jacobian(fit.theta, to_arrays([standing.run for standing in verdict.standings[:2]], fit.data.variants))
    return rows[:1] - rows[1:]
