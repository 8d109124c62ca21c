"""The state of a model as megatron-core's sharded state dict, and random states.

Keys and shapes are those of the whole model, so that any layout can load what any other has saved; only the random
states belong to their layout.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn

from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import only_in_loops

RNG_KEY = "rng_state"
OPTIMIZER_PREFIX = "optimizer.state."
KEPT_PREFIX = "kept."  # callbacks' tensors
# State that callbacks keep, by callback name: tensors in the shapes of the stage's parameters, by parameter name, or
# nested sharded tensors.
Kept = Mapping[str, Mapping[Any, Any]]
# Reads the sharded tensors of a request, and the values that all ranks have in common.
Reader = Callable[[dict[str, Any]], dict[str, Any]]


def model_state(stage: LoopedGPT, *, is_loading: bool = False) -> dict[str, Any]:
    """Return the stage's parameters by local name. Extra states are included only if a backend (FP8) has some.

    `is_loading`: include the extra state of layers that have not run in FP8 yet; they have none, but accept one.
    """
    metadata = {"singleton_local_shards": False, "dp_cp_group": stage.pg_collection.dp_cp}
    state = stage.sharded_state_dict(metadata=metadata)
    config = stage.config
    if is_loading and config.fp8 is not None and config.fp8_recipe == "delayed":
        return state
    return {name: value for name, value in state.items() if not _is_empty_object(value)}


def kept_tensors(stage: LoopedGPT, name: str, tensors: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the tensors that callback `name` keeps of all or some of the model's parameters (`Kept`) as sharded
    tensors, in the same order."""
    if not any(isinstance(tensor, Tensor) for tensor in tensors.values()):
        return dict(tensors)
    parameters, wholes, key = dict(stage.named_parameters()), by_tensor(model_state(stage)), f"{KEPT_PREFIX}{name}"
    return {own: make_sharded_optimizer_tensor(wholes[parameters[own]], kept, key) for own, kept in tensors.items()}


def by_tensor(model: dict[str, Any]) -> dict[Tensor, ShardedTensor | ShardedTensorFactory]:
    """Return the sharded tensors of `model_state` by the stage's own parameters and buffers."""
    return {value.data: value for value in model.values() if isinstance(value, ShardedTensor | ShardedTensorFactory)}


def later_parameters(stage: nn.Module) -> list[nn.Parameter]:
    """Return a stage's parameters that only later loops use; a step that skips those loops gives them no gradient."""
    return [parameter for name, parameter in stage.named_parameters() if only_in_loops(name)]


def _is_empty_object(value: Any) -> bool:
    if not isinstance(value, ShardedObject):
        return False
    return value.data is None or (isinstance(value.data, Tensor) and value.data.numel() == 0)


def random_state() -> ShardedObject:
    """Return this rank's random states."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(RNG_KEY, state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"].numel() != torch.cuda.get_rng_state().numel():
        return  # saved on a CPU and continued on a GPU, or the reverse: the rest means nothing here
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """Yield the tensors of a sharded state dict, including those a factory makes (the gate and up halves of SwiGLU)."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from nested_values(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


class EngineState(Protocol):
    """The interface to an engine's model and optimizer for saving and loading. All methods are collective.

    The state consists of sharded tensors: `model` by local names, `optimizer` by optimizer and parameter.

    Both engines' states have the same keys and shapes, those of the whole model, so checkpoints do not depend on the
    engine.
    """

    def to_save(self) -> dict[str, Any]:
        """Return `model` and `optimizer` with their data, which may share the engine's memory, and `optimizer_step` and
        `optimizer_later_step`."""

    def live_tensors(self) -> Iterable[Tensor]:
        """Return the tensors that training changes and `to_save` may refer to. Not collective."""

    def request(self, *, optimizer: bool) -> dict[str, Any]:
        """Return a request to load `model` and, if wanted, `optimizer`. Entries removed from it (gates) keep their
        initial values."""

    def load(self, request: dict[str, Any], read: Reader) -> dict[str, Any]:
        """Read the request, as changed by the caller, load it, and return what was read. Without `optimizer` in the
        request, the optimizer's state is reset to zero."""

    def set_step(self, step: int, later_step: int) -> None:
        """Set the optimizer's number of updates to `step`, or to `later_step` for parameters that only later loops
        use."""
