"""What saving and loading ask of an engine's model and optimizer, whichever engine it is.

Both engines' states have the same keys and shapes, those of the whole model: a checkpoint does not show who wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

# Reads what a request of sharded tensors asks for, and what all ranks have in common.
Reader = Callable[[dict[str, Any]], dict[str, Any]]


class EngineState(Protocol):
    """Model and optimizer as sharded tensors: `model` by local names, `optimizer` by optimizer and parameter. All
    methods are collective."""

    def to_save(self) -> dict[str, Any]:
        """`model` and `optimizer` with their data; `optimizer_step`."""

    def request(self, *, optimizer: bool) -> dict[str, Any]:
        """`model`, and `optimizer` if wanted, to be loaded. What is taken out of it stays as it is built: gates."""

    def load(self, request: dict[str, Any], read: Reader) -> dict[str, Any]:
        """Read the request, what is left of it and what is added to it, and put it in its place. Without `optimizer` in
        the request, the optimizer's state is zero. Returns what was read."""

    def set_step(self, step: int) -> None:
        """Make the optimizer go on from `step` updates."""
