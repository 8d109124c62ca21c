"""Synthetic studies of a planted law: for tests, for benchmarks/loop_law.py, and to try a design before running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from plt_megatron.experiments.solver import Run

SIZES = (0.3e6, 0.7e6, 1.5e6, 3e6, 5e6)
HORIZONS = (2.5e6, 5e6, 1e7)


@dataclass(frozen=True)
class PlantedLaw:
    """Loss law for small models; A and B are in units of a million parameters and ten million tokens."""

    e: float = 2.0
    a: float = 0.9
    alpha: float = 0.35
    b: float = 0.35
    beta: float = 0.4
    phis: dict[str, float] = field(default_factory=lambda: {"PLT": 0.5, "naive loop": 0.4})

    def loss(self, model: Run) -> float:
        """Return the loss without noise."""
        phi = self.phis.get(model.variant, 0.0)
        size = model.once + model.loops**phi * model.looped
        return self.e + self.a * (size / 1e6) ** -self.alpha + self.b * (model.tokens / 1e7) ** -self.beta


@dataclass(frozen=True)
class Luck:
    """Standard deviations of a loss's noise: shared by a trunk and its branches, of each run, and of each seed."""

    trunk: float = 0.006
    run: float = 0.003
    seed: float = 0.0


def synthetic_study(
    law: PlantedLaw,
    luck: Luck,
    number: int,
    *,
    sizes: Sequence[float] = SIZES,
    loops: Sequence[int] = (1, 2, 3),
    horizons: Sequence[float] = HORIZONS,
    seeds: Sequence[int] = (1,),
) -> list[Run]:
    """Return a run with a noisy loss for each combination; one-loop runs serve all variants. `number` is the seed."""
    rng = np.random.default_rng(number)
    wirings = [("", 1)] if 1 in loops else []
    wirings += [(variant, count) for variant in law.phis for count in loops if count > 1]
    observations = []
    for seed in seeds:
        common = luck.seed * rng.standard_normal()
        for size in sizes:
            for variant, count in wirings:
                own = common + luck.trunk * rng.standard_normal()
                for tokens in horizons:
                    model = Run(variant, 0.0, size, count, tokens)
                    loss = law.loss(model) + own + luck.run * rng.standard_normal()
                    block = f"{variant}-{size:g}-{count}-{seed}"
                    observations.append(Run(variant, 0.0, size, count, tokens, loss, block, seed))
    return observations
