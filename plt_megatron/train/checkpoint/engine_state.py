"""The interface of an engine's model and optimizer for saving and loading.

Both engines' states have the same keys and shapes, those of the whole model: checkpoints do not depend on the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

# Reads what a request of sharded tensors asks for, and what all ranks have in common.
Reader = Callable[[dict[str, Any]], dict[str, Any]]


class EngineState(Protocol):
    """Model and optimizer as sharded tensors: `model` by local names, `optimizer` by optimizer and parameter. All
    methods are collective."""

    def to_save(self) -> dict[str, Any]:
        """`model` and `optimizer` with their data, which may be the engine's own; `optimizer_step` and
        `optimizer_later_step`."""

    def live_tensors(self) -> Iterable[Tensor]:
        """The tensors that training changes and `to_save` may refer to. Not collective."""

    def request(self, *, optimizer: bool) -> dict[str, Any]:
        """`model`, and `optimizer` if wanted, to be loaded. What is taken out of it stays as it is built: gates."""

    def load(self, request: dict[str, Any], read: Reader) -> dict[str, Any]:
        """Read the request, as changed by the caller, and load it. Without `optimizer` in
        the request, the optimizer's state is zero. Returns what was read."""

    def set_step(self, step: int, later_step: int) -> None:
        """Set the optimizer's number of updates to `step`; of what only later loops use, to `later_step`."""
