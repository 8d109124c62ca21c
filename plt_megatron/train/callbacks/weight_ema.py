"""An exponential moving average of the weights, with `training.ema_decay`: saved, resumed, validated, exported."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from plt_megatron.run_folder.checkpoints import EMA
from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.engine import StepResult

if TYPE_CHECKING:
    from plt_megatron.train.weight_average import WeightAverage


class WeightEMA(Callback):
    """Follows the weights after each update. A run that had none begins with the weights of its next update."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._decay = run.config.training.ema_decay
        self._average: WeightAverage | None = None
        if self._decay is not None:
            from plt_megatron.train.megatron_engine import MegatronEngine
            from plt_megatron.train.weight_average import WeightAverage

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
