"""An exponential moving average of the weights, with `training.ema_decay`: saved, resumed, validated, exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plt_megatron.run_folder.checkpoints import EMA
from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.checkpoint import state
from plt_megatron.train.engine import StepResult

if TYPE_CHECKING:
    from plt_megatron.train.megatron_engine import MegatronEngine


class WeightEMA(Callback):
    """Follows the weights after each update. A run that had none begins with the weights of its next update."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._decay = run.config.training.ema_decay
        self._average: WeightAverage | None = None
        if self._decay is not None:
            from plt_megatron.train.megatron_engine import MegatronEngine

            assert isinstance(run.engine, MegatronEngine), "validation refuses it with another"
            self.name = EMA
            self._average = WeightAverage(run.engine)

    def after_step(self, step: Step, result: StepResult) -> None:
        """Follow the weights if they were updated."""
        if self._average is not None and self._decay is not None and result.updated:
            self._average.update(self._decay)

    def other_weights(self) -> dict[str, AbstractContextManager[None]]:
        """The average, once there is one."""
        if self._average is None or self._average.updates == 0:
            return {}
        return {EMA: self._average.applied()}

    def state_dict(self) -> dict[str, Any]:
        """How many updates went into it."""
        return {} if self._average is None else {"updates": self._average.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; without that, from the next update."""
        if self._average is not None:
            self._average.updates = state.get("updates", 0)

    def parameter_state(self) -> dict[Any, Any]:
        """The average."""
        return {} if self._average is None else self._average.sharded(EMA)


class WeightAverage:
    """Moving average of each weight over the updates, in fp32; starts from the weights after the first one.

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
