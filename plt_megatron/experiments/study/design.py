"""Choose the runs that tell the most about the law for their price, one by one, by the Fisher information they add.

An `Arm` is a model with a seed. Training it to one horizon leaves checkpoints from which shorter and longer ones
branch, so that an arm's further horizons cost little: the decay alone, or the added part of a longer run. Branches
share their trunk's noise, which the information takes into account.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plt_megatron.experiments.files import NoiseSettings
from plt_megatron.experiments.law import LawFit
from plt_megatron.experiments.solver import UNIT_D, UNIT_N, Shape, jacobian, to_arrays

Z95 = 1.959964
# A weak prior: standard deviations of E, A, B, alpha, beta and each phi before any run.
_BELIEF = (1.0, 1.0, 1.0, 0.2, 0.2)
_BELIEF_PHI = 0.5
_LEAST_GAIN = 1e-4  # in the criterion, in logarithms: anything that adds less is not worth a run
_SKELETON = 0.7  # share of the budget, at most, for the runs without which there is no law


@dataclass(frozen=True)
class Arm(Shape):
    """A model with a seed. `variant`: empty for one loop; `seconds_per_token`: training time, 0 if not known."""

    size: str
    seed: int
    seconds_per_token: float = 0.0


@dataclass(frozen=True)
class Horizons:
    """Lengths of runs, ascending, in tokens; the last `decay_share` of each has a falling learning rate."""

    tokens: tuple[float, ...]
    decay_share: float = 0.2

    def new_tokens(self, done: Sequence[float], added: Sequence[float]) -> float:
        """Return the tokens to train to add horizons to an arm that has `done`: the longest first, then branches."""
        known, total = list(done), 0.0
        for tokens in sorted(added, reverse=True):
            if any(other >= tokens for other in known):
                total += self.decay_share * tokens
            else:
                longest = max(known, default=0.0)
                total += tokens - (1 - self.decay_share) * longest
            known.append(tokens)
        return total


@dataclass(frozen=True)
class Design:
    """Chosen runs, and the precision expected from them.

    Attributes:
        chosen: (index of an arm, tokens), in the order of choice.
        seconds: total training time.
        covariance: [p, p] of E, A, B, alpha, beta and the phis, after these runs and all earlier ones.
        variants: the variants of the phis.
    """

    chosen: list[tuple[int, float]]
    seconds: float
    covariance: np.ndarray
    variants: tuple[str, ...]

    def half_width(self, variant: str) -> float:
        """Return half of the 95 % interval of a variant's phi that is expected after the runs."""
        column = 5 + self.variants.index(variant)
        return Z95 * math.sqrt(self.covariance[column, column])

    def in_words(self) -> str:
        """Describe the design: `this budget determines phi of PLT within ±0.10, phi of naive loop within ±0.12`."""
        parts = [f"phi of {name} within ±{self.half_width(name):.2g}" for name in self.variants]
        return f"this budget determines {', '.join(parts)}"


def expected_theta(sizes: Sequence[float], tokens: Sequence[float], variants: int) -> np.ndarray:
    """Return a law [5 + variants] to plan with before the first run: Chinchilla's exponents, and terms of 0.7 nats at
    the middle of the sizes and tokens."""
    alpha, beta = 0.34, 0.28
    n, d = (math.exp(float(np.mean(np.log(values)))) for values in (sizes, tokens))
    a, b = 0.7 * (n / UNIT_N) ** alpha, 0.7 * (d / UNIT_D) ** beta
    return np.array([1.7, a, b, alpha, beta, *[0.46] * variants])


def estimated_noise(fit: LawFit) -> NoiseSettings:
    """Estimate the noise of trunks and of runs from a fit's residuals."""
    count = np.bincount(fit.data.blocks)
    means = np.bincount(fit.data.blocks, fit.adjusted) / count
    within = fit.adjusted - means[fit.data.blocks]
    spare = max(1, fit.data.n - len(count))
    run = math.sqrt(float(within @ within) / spare)
    between = float(np.mean(means**2)) - run**2 * float(np.mean(1 / count))
    return NoiseSettings(math.sqrt(max(between, (0.2 * run) ** 2, 1e-12)), max(run, 1e-6))


def choose_runs(
    arms: Sequence[Arm],
    horizons: Horizons,
    theta: np.ndarray,
    variants: Sequence[str],
    seconds: float,
    *,
    noise: NoiseSettings,
    done: Mapping[int, Sequence[float]] | None = None,
    closed: Collection[int] = (),
    contrasts: np.ndarray | None = None,
) -> Design:
    """Spend `seconds` of training on the runs that best determine the phis, and `contrasts`.

    If no runs are `done`, those that any law needs come first: one loop of three sizes, as far apart as the budget
    allows, and two wirings of each variant.

    Args:
        theta: [5 + variants], the law as far as it is known.
        done: horizons that are finished or under way, by index of the arm.
        closed: indices of arms that are not trained any further.
        contrasts: [k, 5 + variants], gradients of further quantities to determine, such as differences of losses.
    """
    planner = _Planner(arms, horizons, theta, tuple(variants), noise, contrasts, closed)
    start = {index: tuple(sorted(tokens)) for index, tokens in (done or {}).items()}
    designs = [planner.spend(seconds, start, by_price) for by_price in (True, False)]
    return min(designs, key=lambda design: planner.criterion(np.linalg.inv(design.covariance)[None])[0])


@dataclass
class _Planner:
    """Information of arms, and the greedy choice among them."""

    arms: Sequence[Arm]
    horizons: Horizons
    theta: np.ndarray
    variants: tuple[str, ...]
    noise: NoiseSettings
    contrasts: np.ndarray | None
    closed: Collection[int]

    def __post_init__(self) -> None:
        count = len(self.variants)
        self.prior = np.diag(1.0 / np.array([*_BELIEF, *[_BELIEF_PHI] * count]) ** 2)
        phis = np.eye(5 + count)[5:]
        self.interests = phis if self.contrasts is None else np.concatenate([phis, self.contrasts])
        tokens = self.horizons.tokens
        runs = to_arrays([arm.trained(each) for arm in self.arms for each in tokens], self.variants)
        # Derivatives [arms, horizons, p] of the losses.
        self.slopes = jacobian(self.theta, runs).reshape(len(self.arms), len(tokens), -1)
        self.information = functools.cache(self._information)

    def _information(self, arm: int, tokens: tuple[float, ...]) -> np.ndarray:
        """Return the information [p, p] of an arm trained to these horizons."""
        slopes = self.slopes[arm, [self.horizons.tokens.index(each) for each in tokens]]
        covariance = self.noise.trunk**2 + self.noise.run**2 * np.eye(len(tokens))
        information: np.ndarray = slopes.T @ np.linalg.solve(covariance, slopes)
        return information

    def criterion(self, informations: np.ndarray) -> np.ndarray:
        """Return the criterion [b] of informations [b, p, p]: the mean logarithm of the variances of the quantities of
        interest, plus a tenth of the whole law's, so that none of its coefficients is left to the prior."""
        covariances = np.linalg.inv(informations)
        variances = np.einsum("kp,bpq,kq->bk", self.interests, covariances, self.interests)
        _, volume = np.linalg.slogdet(covariances)
        return np.log(np.maximum(variances, 1e-300)).mean(1) + 0.1 * volume / covariances.shape[1]

    def spend(self, seconds: float, start: Mapping[int, tuple[float, ...]], by_price: bool) -> Design:
        """Choose runs one by one: the most informative for its price, or the most informative."""
        held: dict[int, tuple[float, ...]] = {arm: tokens for arm, tokens in start.items() if tokens}
        information = self.prior + sum((self.information(*item) for item in held.items()), np.zeros_like(self.prior))
        chosen: list[tuple[int, float]] = []
        spent = 0.0
        first = [] if held else self._skeleton(_SKELETON * seconds)
        while True:
            found = first.pop(0) if first else self._best(information, held, seconds - spent, by_price)
            if found is None:
                return Design(chosen, spent, np.linalg.inv(information), self.variants)
            arm, tokens, price = found
            old = held.get(arm, ())
            information = information + (self.information(arm, tokens) - self.information(arm, old))
            chosen += [(arm, each) for each in sorted(set(tokens) - set(old), reverse=True)]
            spent += price
            held[arm] = tokens

    def _skeleton(self, seconds: float) -> list[tuple[int, tuple[float, ...], float]]:
        """Return the runs any law needs, with the largest size that `seconds` pay for; none if they do not suffice."""
        arms, tokens = self.arms, self.horizons.tokens
        left = [i for i in range(len(arms)) if i not in self.closed]
        single = sorted((i for i in left if arms[i].loops == 1), key=lambda i: arms[i].looped)
        sizes = list(dict.fromkeys(arms[i].size for i in single))
        for largest in range(len(sizes) - 1, 1, -1):
            chosen = [next(i for i in single if arms[i].size == sizes[at]) for at in (0, largest // 2, largest)]
            for variant in self.variants:
                for size, pick in ((sizes[0], max), (sizes[largest // 2], min)):
                    looped = [i for i in left if arms[i].variant == variant and arms[i].loops > 1]
                    own = [i for i in looped if arms[i].size == size]
                    chosen += [pick(own, key=lambda i: arms[i].loops)] if own else []
            prices = [self.horizons.new_tokens([], tokens) * arms[i].seconds_per_token for i in chosen]
            if sum(prices) <= seconds:
                return [(i, tokens, price) for i, price in zip(chosen, prices, strict=True)]
        return []

    def _best(
        self, information: np.ndarray, held: Mapping[int, tuple[float, ...]], left: float, by_price: bool
    ) -> tuple[int, tuple[float, ...], float] | None:
        """Return (arm, all its horizons, price) of the best addition that `left` seconds pay for."""
        options = [option for option in self._options(held) if option[2] <= left]
        if not options:
            return None
        added = [self.information(arm, tokens) - self.information(arm, held.get(arm, ())) for arm, tokens, _ in options]
        changed = information + np.stack(added)
        gains = self.criterion(information[None])[0] - self.criterion(changed)
        prices = np.array([price for _, _, price in options])
        best = int(np.argmax(gains / prices if by_price else gains))
        return options[best] if gains[best] > _LEAST_GAIN else None

    def _options(self, held: Mapping[int, tuple[float, ...]]) -> list[tuple[int, tuple[float, ...], float]]:
        """Return (arm, all its horizons, price of new ones) for each arm up to each horizon, with all shorter ones."""
        options = []
        for index, arm in enumerate(self.arms):
            if index in self.closed:
                continue
            own = held.get(index, ())
            for place in range(len(self.horizons.tokens)):
                tokens = tuple(sorted({*own, *self.horizons.tokens[: place + 1]}))
                if len(tokens) > len(own):
                    new = self.horizons.new_tokens(own, [each for each in tokens if each not in own])
                    options.append((index, tokens, new * arm.seconds_per_token))
        return options
