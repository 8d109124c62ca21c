"""An exponential moving average of an engine's weights, in fp32 and shared out as its optimizer's main weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plt_megatron.train.checkpoint import state
from plt_megatron.train.megatron_engine import MegatronEngine


class WeightAverage:
    """Moving average of each weight over the updates; starts from the weights after the first one.

    A rank keeps what it owns of the main weights: 4 bytes a parameter over the ranks that hold the same ones.

    Args:
        engine: whose main weights are averaged.

    Attributes:
        updates: so many went into it. Before the first, it holds the weights that the engine had when this was built.
    """

    def __init__(self, engine: MegatronEngine) -> None:
        self.updates = 0
        self._engine = engine
        self._main = [part.pieces() for part in engine.state.parts]
        self._pieces = [{index: main.detach().clone() for index, main in part.items()} for part in self._main]

    def tensors(self) -> Iterator[Tensor]:
        """This rank's pieces, flat."""
        return (piece for part in self._pieces for piece in part.values())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """The weights have changed: `decay` of the average, and the rest of them. Not collective."""
        average, main = list(self.tensors()), [piece for part in self._main for piece in part.values()]
        if not average:  # a rank may own nothing
            pass
        elif self.updates == 0:
            torch._foreach_copy_(average, main)
        else:
            torch._foreach_lerp_(average, main, 1 - decay)
        self.updates += 1

    def sharded(self, name: str) -> dict[int, Any]:
        """As megatron-core's sharded tensors, which share its memory: keys and shapes are those of the whole model, so
        that it is loaded in any layout. `name`: of what keeps it."""
        model = state.model_state(self._engine.stage)
        prefix = f"{state.KEPT_PREFIX}{name}."
        parts = zip(self._engine.state.parts, self._pieces, strict=True)
        return {number: part.sharded_beside(model, pieces, prefix) for number, (part, pieces) in enumerate(parts)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the engine computes with the average, rounded to the model's precision. Collective; no step in it.

        What it replaces comes back bit for bit.
        """
        self._engine.gather_parameters()  # a step's weights may be under way
        own = [part.model_pieces() for part in self._engine.state.parts]
        before = [{index: piece.clone() for index, piece in part.items()} for part in own]
        self._put(own, self._pieces)
        try:
            yield
        finally:
            self._put(own, before)

    @torch.no_grad()
    def _put(self, own: list[dict[int, Tensor]], values: list[dict[int, Tensor]]) -> None:
        for part, pieces in zip(own, values, strict=True):
            for index, piece in part.items():
                piece.copy_(pieces[index])
        self._engine.share_parameters()
