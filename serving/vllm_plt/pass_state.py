"""State of a pass through the layers: its loop, and the keys that it reads and hands on."""

from dataclasses import dataclass

import torch

from vllm_plt.key_shift import KeyCarry


class FirstKeys:
    """Loop 1's keys of a step's tokens, to which later loops attend with their own values.

    Args:
        given: [T, layers, K * D], the keys of all layers, for a later loop's pass; None for loop 1's, which records its
            own.
    """

    def __init__(self, given: torch.Tensor | None):
        self.given = given
        self.layers = 0
        self._kept: list[torch.Tensor] = []

    def keep(self, key: torch.Tensor) -> None:
        """Record the next layer's key [T, K * D], as a copy that does not keep the whole projection output alive."""
        self._kept.append(key.clone())

    def take(self) -> torch.Tensor:
        """Return the next layer's key, [T, K * D]."""
        self.layers += 1
        return self.given[:, self.layers - 1]

    def kept(self) -> torch.Tensor:
        return torch.stack(self._kept, 1)


@dataclass
class PassState:
    """State of one pass through some layers.

    Attributes:
        loop: the loop of all rows, from 0; None if the rows are loops 1..L of N / L tokens, one loop after the other.
        shifted: carry of the shifted keys; None if keys are not shifted.
        first: loop 1's keys; None if later loops' passes do not need them.
    """

    loop: int | None
    shifted: KeyCarry | None
    first: FirstKeys | None = None
