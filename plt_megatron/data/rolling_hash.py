"""Hash all windows of n tokens in an array, by a polynomial modulo 2^64.

The hash of t_0 ... t_(n-1) is the sum of r(t_i) * B^i, with a random-looking 64-bit r for each token. Equal windows
have equal hashes; different windows may collide, so a caller must compare the tokens themselves.
"""

from __future__ import annotations

import numpy as np

_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse modulo 2^64
_MASK = 2**64 - 1
_INVERSE = pow(_BASE, -1, 2**64)


def scramble[T: (int, np.ndarray)](values: T) -> T:
    """Map numbers below 2^64, an int or an array of uint64, to random-looking ones, one to one: the finalizer of
    splitmix64. For a single number, an int is an order of magnitude faster."""
    values = (values + 0x9E3779B97F4A7C15) & _MASK
    values = ((values ^ (values >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    values = ((values ^ (values >> 27)) * 0x94D049BB133111EB) & _MASK
    return values ^ (values >> 31)


class WindowHasher:
    """Hashes windows of `size` tokens in arrays of up to `longest` tokens."""

    def __init__(self, size: int, longest: int) -> None:
        self.size = size
        self._powers = _powers(_BASE, longest)
        self._inverses = _powers(_INVERSE, longest)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Return the hash of the window at each token, uint64 [len(tokens) - size + 1]; empty if no window fits."""
        if len(tokens) < self.size:
            return np.empty(0, np.uint64)
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(scramble(tokens.astype(np.uint64)) * self._powers[: len(tokens)], out=sums[1:])
        windows = sums[self.size :] - sums[: -self.size]
        return windows * self._inverses[: len(windows)]


def _powers(base: int, count: int) -> np.ndarray:
    values = np.full(count, base, np.uint64)
    values[:1] = 1
    return np.cumprod(values, dtype=np.uint64)
