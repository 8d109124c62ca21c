"""What layers need to know of the pass that they run in, and what they hand on from it."""

from dataclasses import dataclass

import torch

from vllm_plt.key_shift import KeyCarry


class FirstKeys:
    """Loop 1's keys of a step's tokens, where later loops attend to them with values of their own.

    Args:
        given: [T, layers, K * D], of all layers of a later loop's pass; None: this is loop 1's, which keeps its own.
    """

    def __init__(self, given: torch.Tensor | None):
        self.given = given
        self.layers = 0
        self._kept: list[torch.Tensor] = []

    def keep(self, key: torch.Tensor) -> None:
        """The next layer's, [T, K * D]. A copy, which does not keep all of the projection's output."""
        self._kept.append(key.clone())

    def take(self) -> torch.Tensor:
        """The next layer's, [T, K * D]."""
        self.layers += 1
        return self.given[:, self.layers - 1]

    def kept(self) -> torch.Tensor:
        return torch.stack(self._kept, 1)


@dataclass
class PassState:
    """Of one pass through some layers.

    Attributes:
        loop: of all rows, from 0; None: the rows are loops 1..L of N / L tokens, loop after loop.
        shifted: of keys that are shifted, else None.
        first: None where later loops' passes need no keys of loop 1 handed to them.
    """

    loop: int | None
    shifted: KeyCarry | None
    first: FirstKeys | None = None
