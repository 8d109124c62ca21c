"""What saving and loading ask of an engine's model and optimizer, whichever engine it is.

Both engines' states have the same keys and shapes, those of the whole model: a checkpoint does not show who wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from plt_megatron.model.initialization import global_names, initial_value
from plt_megatron.model.parameters import only_in_loops
from plt_megatron.train.checkpoint import state
from plt_megatron.train.engine import Engine
from plt_megatron.train.megatron_engine import MegatronEngine

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
        the request, moments are zero. Returns what was read."""

    def set_step(self, step: int) -> None:
        """Make the optimizer go on from `step` updates."""


def state_of(engine: Engine) -> EngineState:
    """An engine's state."""
    return MegatronState(engine) if isinstance(engine, MegatronEngine) else engine.state  # type: ignore[attr-defined]


class MegatronState:
    """Of megatron-core's distributed optimizer."""

    def __init__(self, engine: MegatronEngine) -> None:
        self._engine = engine

    def to_save(self) -> dict[str, Any]:
        """See `EngineState`."""
        model = state.model_state(self._engine)
        return {
            "model": model,
            "optimizer": state.optimizer_state(self._engine, model, is_loading=False),
            "optimizer_step": state.step_of_optimizer(self._engine),
        }

    def request(self, *, optimizer: bool) -> dict[str, Any]:
        """See `EngineState`."""
        model = state.model_state(self._engine, is_loading=True)
        if not optimizer:
            return {"model": model}
        return {"model": model, "optimizer": state.optimizer_state(self._engine, model, is_loading=True)}

    def load(self, request: dict[str, Any], read: Reader) -> dict[str, Any]:
        """See `EngineState`."""
        loaded = read(request)
        self._build_gates(loaded["model"])
        with state.pickled_fp8_state_is_trusted():
            self._engine.stage.load_state_dict(loaded["model"], strict=False)  # what is missing is known to be a gate
        for index, part in enumerate(state.optimizers(self._engine)):
            state.allocate(part)
            state.load_parameter_states(part, loaded.get("optimizer", {}).get(index, {}))
        return loaded

    def set_step(self, step: int) -> None:
        """See `EngineState`."""
        state.set_step_of_optimizer(self._engine, step)

    @torch.no_grad()
    def _build_gates(self, loaded: dict[str, Any]) -> None:
        """As built, where none are loaded: an engine that has trained already may be loaded too."""
        stage = self._engine.stage
        for own_name, (name, parameter) in zip(dict(stage.named_parameters()), global_names(stage), strict=True):
            if only_in_loops(name) and own_name not in loaded:
                parameter.copy_(initial_value(stage, name, self._engine.config.training.seed))
