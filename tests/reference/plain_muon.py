"""Muon from its equations, in plain torch: the reference of `optimizer.name: muon`.

Jordan et al., https://kellerjordan.github.io/posts/muon/: momentum, Nesterov's step, and the nearest semi-orthogonal
matrix by a polynomial iteration. Liu et al., arXiv 2502.16982: decoupled weight decay and the size of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# a X + b (X X^T) X + c (X X^T)^2 X, an entry for each iteration.
POLYNOMIALS = {
    "simple": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    # arXiv 2505.16932, with its safety factor 1.01.
    "polar_express": [
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ],
}
SIZES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(max(rows, columns)),
    "shape_scaling": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "unit_rms_norm": lambda rows, columns: math.sqrt(rows / columns),
}


def orthogonalized(matrix: Tensor, steps: int, kind: str) -> Tensor:
    """About U V^T of matrix = U S V^T, in the precision of `matrix`."""
    x = matrix / matrix.norm()
    for step in range(steps):
        a, b, c = POLYNOMIALS[kind][step % len(POLYNOMIALS[kind])]
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class PlainMuon:
    """One matrix's updates; `parts` cuts it into those that are orthogonalized each, and joins them again."""

    def __init__(
        self,
        weight: Tensor,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        kind: str = "quintic",
        size: str = "spectral",
        scale: float = 0.2,
        rows: list[Tensor] | None = None,
    ) -> None:
        """`rows`: the rows of each matrix that the weight is made of; None: it is one."""
        self.weight, self.buffer = weight, torch.zeros_like(weight)
        self.momentum, self.nesterov = momentum, nesterov
        self.steps, self.kind, self.size, self.scale = steps, kind, size, scale
        self.rows = rows or [torch.arange(len(weight))]

    def step(self, gradient: Tensor, rate: float, decay: float) -> None:
        """Change the weight."""
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        direction = self.buffer
        if self.nesterov:
            direction = self.momentum * self.buffer + (1 - self.momentum) * gradient
        self.weight = (1 - rate * decay) * self.weight
        for rows in self.rows:
            part = direction[rows]
            update = orthogonalized(part, self.steps, self.kind) * SIZES[self.size](*part.shape) * self.scale
            self.weight[rows] -= rate * update
