"""Hash all windows of n tokens in an array, by a polynomial modulo 2^64.

The hash of t_0 ... t_(n-1) is the sum of r(t_i) * B^i, with a random-looking 64-bit r for each token. Equal windows
have equal hashes; different windows may collide, so a caller must compare the tokens themselves.
"""

from __future__ import annotations

import numpy as np

_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse modulo 2^64
_MASK = 2**64 - 1
_INVERSE = pow(_BASE, -1, 2**64)


def scramble(values: np.ndarray) -> np.ndarray:
    """Map uint64 to random-looking uint64, one to one, by the finalizer of splitmix64."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def scramble_number(value: int) -> int:
    """Apply `scramble` to one number below 2^64, an order of magnitude faster than to an array of one."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


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
