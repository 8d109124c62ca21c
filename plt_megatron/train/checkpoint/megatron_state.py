"""The state of the megatron engine: a model on megatron-core's distributed optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from plt_megatron.config.optimizers import OptimizerSpec
from plt_megatron.model.initialization import global_names, initial_value
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import only_in_loops
from plt_megatron.train.checkpoint import state
from plt_megatron.train.checkpoint.engine_state import Reader
from plt_megatron.train.checkpoint.optimizer_state import OptimizerPart


class MegatronState:
    """An `EngineState`.

    Args:
        stage: the model.
        optimizers: megatron-core's, all of `spec`'s kind.
        seed: the run's; parameters that a checkpoint lacks start as they are built.
        matrices: parameters that are updated as whole matrices.

    Attributes:
        parts: the optimizers' states.
        later_step: updates of the parameters that only later loops use.
    """

    def __init__(
        self,
        stage: LoopedGPT,
        optimizers: Sequence[DistributedOptimizer],
        spec: OptimizerSpec,
        seed: int,
        matrices: Sequence[Tensor] = (),
    ) -> None:
        self._stage, self._seed = stage, seed
        self.parts = [OptimizerPart(optimizer, spec, matrices) for optimizer in optimizers]
        self.later_step = 0

    def to_save(self) -> dict[str, Any]:
        """See `EngineState`."""
        model = state.model_state(self._stage)
        return {
            "model": model,
            "optimizer": self._optimizer(model),
            "optimizer_step": max(part.step for part in self.parts),
            "optimizer_later_step": self.later_step,
        }

    def _optimizer(self, model: dict[str, Any]) -> dict[int, Any]:
        return {index: part.sharded(model) for index, part in enumerate(self.parts)}

    def live_tensors(self) -> Iterator[Tensor]:
        """See `EngineState`."""
        yield from (*self._stage.parameters(), *self._stage.buffers())
        for part in self.parts:
            yield from part.tensors()

    def request(self, *, optimizer: bool) -> dict[str, Any]:
        """See `EngineState`."""
        model = state.model_state(self._stage, is_loading=True)
        return {"model": model} | ({"optimizer": self._optimizer(model)} if optimizer else {})

    def load(self, request: dict[str, Any], read: Reader) -> dict[str, Any]:
        """See `EngineState`."""
        loaded = read(request)
        self._build_gates(loaded["model"])
        with state.pickled_fp8_state_is_trusted():
            self._stage.load_state_dict(loaded["model"], strict=False)  # what is missing is known to be a gate
        for index, part in enumerate(self.parts):
            part.reset_others(loaded.get("optimizer", {}).get(index, {}))
        return loaded

    def set_step(self, step: int, later_step: int) -> None:
        """See `EngineState`."""
        self.later_step = later_step
        later = [parameter for name, parameter in self._stage.named_parameters() if only_in_loops(name)]
        for part in self.parts:
            part.set_step(step, later, later_step)

    @torch.no_grad()
    def _build_gates(self, loaded: dict[str, Any]) -> None:
        """As built, where none are loaded: an engine that has trained already may be loaded too."""
        stage = self._stage
        for own_name, (name, parameter) in zip(dict(stage.named_parameters()), global_names(stage), strict=True):
            if only_in_loops(name) and own_name not in loaded:
                parameter.copy_(initial_value(stage, name, self._seed))
