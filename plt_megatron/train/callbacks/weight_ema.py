"""An exponential moving average of the weights, with `training.ema_decay`: saved, resumed, validated, exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from plt_megatron.run_folder.checkpoints import EMA
from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.checkpoint import state
from plt_megatron.train.engine import StepResult
from plt_megatron.train.megatron_engine import MegatronEngine


class WeightEMA(Callback):
    """Updates the average after each update of the weights. A run without one starts from its next update's weights."""

    name = EMA

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(run.engine, MegatronEngine), "validation rejects training.ema_decay with other engines"
        assert run.config.training.ema_decay is not None
        self._average, self._decay = WeightAverage(run.engine), run.config.training.ema_decay

    def after_step(self, step: Step, result: StepResult) -> None:
        if result.updated:
            self._average.update(self._decay)

    def other_weights(self) -> dict[str, AbstractContextManager[None]]:
        """Return the average, once there is one."""
        return {EMA: self._average.applied()} if self._average.updates else {}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._average.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the saved count or, without one, start with the next update."""
        self._average.updates = state.get("updates", 0)

    def parameter_state(self) -> dict[Any, Any]:
        return self._average.sharded(EMA)


class WeightAverage:
    """Moving average of each weight over the updates, in fp32; starts from the weights after the first one.

    A rank keeps the average of the main weights it owns: 4 bytes per parameter, spread over the ranks that hold the
    same parameters.

    Attributes:
        updates: number of updates averaged. Before the first, the average holds the engine's weights at construction.
    """

    def __init__(self, engine: MegatronEngine) -> None:
        self.updates = 0
        self._engine = engine
        self._main = [part.pieces() for part in engine.state.parts]
        self._pieces = [{index: main.detach().clone() for index, main in part.items()} for part in self._main]

    def tensors(self) -> Iterator[Tensor]:
        """Return this rank's pieces, flat."""
        return (piece for part in self._pieces for piece in part.values())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average to `decay` of itself plus the rest of the current weights. Not collective."""
        average, main = list(self.tensors()), [piece for part in self._main for piece in part.values()]
        if not average:  # a rank may own nothing
            pass
        elif self.updates == 0:
            torch._foreach_copy_(average, main)
        else:
            torch._foreach_lerp_(average, main, 1 - decay)
        self.updates += 1

    def sharded(self, name: str) -> dict[int, Any]:
        """Return the average as megatron-core's sharded tensors, which share its memory. Keys and shapes are those of
        the whole model, so that any layout can load it. `name` is the callback's."""
        model = state.model_state(self._engine.stage)
        prefix = f"{state.KEPT_PREFIX}{name}."
        parts = zip(self._engine.state.parts, self._pieces, strict=True)
        return {number: part.sharded_beside(model, pieces, prefix) for number, (part, pieces) in enumerate(parts)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the engine compute with the average, rounded to the model's precision, within this block. Collective; no
        step may run inside.

        The replaced weights are restored bit for bit.
        """
        self._engine.gather_parameters()  # the last step's weights may still be in flight
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
