"""Block bootstrap of the law: what else these runs could have said, had their luck been another.

Blocks are runs that share a part of their training, and runs with the same seed. Sizes, loops and tokens stay as they
are (they were chosen, not drawn); a block's residuals change their sign and size together by a random factor (the wild
cluster bootstrap, Cameron, Gelbach and Miller 2008, with Webb's six factors). Before that each block's residuals are
freed of the fit's pull towards it (Bell and McCaffrey 2002): a law of eight coefficients through two dozen blocks
makes residuals smaller than the luck that they stand for.
"""

from __future__ import annotations

import numpy as np

from plt_megatron.experiments.study.observations import Arrays

_FACTORS = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])
_SMALLEST = 0.05  # of what a block keeps for itself: one that alone determines a coefficient has no residual


def adjusted_residuals(residuals: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, data: Arrays) -> np.ndarray:
    """Residuals [n] at the size of the errors that they come from: (I - H_gg)^-1/2 of each block's.

    Args:
        jacobian: [n, p] of the losses by all coefficients.
    """
    roots = np.sqrt(weights)
    orthogonal = _range(roots[:, None] * jacobian)
    adjusted = np.empty_like(residuals)
    for block in range(data.blocks.max() + 1):
        rows = np.flatnonzero(data.blocks == block)
        own = orthogonal[rows]
        values, vectors = np.linalg.eigh(np.eye(len(rows)) - own @ own.T)
        root = vectors / np.maximum(values, _SMALLEST) @ vectors.T
        adjusted[rows] = root @ (roots[rows] * residuals[rows]) / roots[rows]
    return adjusted


def draw_errors(adjusted: np.ndarray, data: Arrays, count: int, rng: np.random.Generator) -> np.ndarray:
    """Errors [count, n]: what all runs of a seed have in common, and what is a block's own, each with its factor."""
    seeds = data.seeds.max() + 1
    means = np.zeros(seeds)
    if seeds > 1:
        sums, counts = np.bincount(data.seeds, adjusted), np.bincount(data.seeds)
        means = sums / counts - adjusted.mean()
    own = adjusted - means[data.seeds]
    blocks = rng.choice(_FACTORS, size=(count, data.blocks.max() + 1))
    common = rng.choice(_FACTORS, size=(count, seeds)) * np.sqrt(seeds / max(1, seeds - 1))
    return own * blocks[:, data.blocks] + (means * common)[:, data.seeds]


def _range(matrix: np.ndarray) -> np.ndarray:
    """An orthonormal basis [n, rank] of the columns: a coefficient at its bound has none of its own."""
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, values > 1e-10 * values.max(initial=0.0)]
