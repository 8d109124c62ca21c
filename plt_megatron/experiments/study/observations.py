"""What runs say about the law: one observation for each run's end, and all of them as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plt_megatron.errors import UserError


@dataclass(frozen=True)
class Observation:
    """One finished run.

    Attributes:
        variant: how its loops are wired; of no matter to a run of one loop.
        once, looped: parameters that a token meets once, and in each loop; without embeddings.
        tokens: it was trained on.
        loss: final, in nats per token or bits per byte.
        block: runs with the same name share a part of their training (branches of one trunk), and so their luck.
        seed: of weights and data order.
    """

    variant: str
    once: float
    looped: float
    loops: int
    tokens: float
    loss: float
    block: str
    seed: int = 1


@dataclass(frozen=True)
class Arrays:
    """Observations as arrays [n].

    Attributes:
        variants: names, of those that have a run with several loops.
        variant: index of each observation's there; 0 for one loop, whatever its variant.
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

    def subset(self, rows: np.ndarray) -> Arrays:
        """The observations `rows` (indices or a mask), of the same variants."""
        arrays = {
            name: getattr(self, name)[rows]
            for name in ("variant", "once", "looped", "loops", "tokens", "loss", "blocks", "seeds")
        }
        return Arrays(self.variants, **arrays)


def looped_variants(observations: Sequence[Observation]) -> tuple[str, ...]:
    """The variants that have an observation with several loops, as they come."""
    return tuple(dict.fromkeys(each.variant for each in observations if each.loops > 1))


def to_arrays(observations: Sequence[Observation], variants: Sequence[str]) -> Arrays:
    """Observations as arrays. `variants`: names of all that have several loops.

    Raises:
        UserError: a loss is no number, or a size is not positive.
    """
    for each in observations:
        sound = math.isfinite(each.loss) and each.once >= 0 and each.looped > 0 and each.tokens > 0 and each.loops >= 1
        if not sound:
            raise UserError(f"{each.block}: the law takes finite losses and positive sizes, got {each}")
    index = {name: place for place, name in enumerate(variants)}
    once, looped, loops, tokens, loss = (
        np.array([float(getattr(each, name)) for each in observations])
        for name in ("once", "looped", "loops", "tokens", "loss")
    )
    variant = np.array([index[each.variant] if each.loops > 1 else 0 for each in observations], dtype=int)
    blocks, seeds = _indices([each.block for each in observations]), _indices([each.seed for each in observations])
    return Arrays(tuple(variants), variant, once, looped, loops, tokens, loss, blocks, seeds)


def _indices(values: Sequence[object]) -> np.ndarray:
    known = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return np.array([known[value] for value in values], dtype=int)
