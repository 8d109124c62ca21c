"""The state of an engine as megatron-core's sharded state dicts: the model, its optimizer, the schedule, random states.

Keys and shapes are those of the whole model (`fully_reshardable`), so that any layout can load what any other has
saved; only the random states belong to their layout. Four things that megatron-core 0.19 gets wrong are put right
here, each where it is marked.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from plt_megatron.train.engine import Engine
from plt_megatron.train.megatron_engine import MegatronEngine

RNG_KEY = "rng_state"
OPTIMIZER_PREFIX = "optimizer.state."
_TRUST_VARIABLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def sharding_metadata(engine: Engine) -> dict[str, Any]:
    """What megatron-core's `sharded_state_dict` methods have to be told, the model's and the optimizer's alike."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": engine.groups.dp_cp,
    }


def model_state(engine: Engine, *, is_loading: bool = False) -> dict[str, Any]:
    """The stage's parameters by their local names. Extra states count only where a backend (FP8) has some.

    `is_loading`: a layer that has not run in FP8 yet has no state, but will take one.
    """
    state = engine.stage.sharded_state_dict(metadata=sharding_metadata(engine))
    config = engine.stage.config
    if is_loading and config.fp8 is not None and config.fp8_recipe == "delayed":
        return state
    return {name: value for name, value in state.items() if not _is_empty_object(value)}


@contextmanager
def pickled_fp8_state_is_trusted() -> Iterator[None]:
    """Within it, Transformer Engine's layers take the scales and histories of delayed scaling, which they keep pickled.

    A checkpoint is unpickled anyway, by megatron-core, after its checksums have been compared.
    """
    before = os.environ.get(_TRUST_VARIABLE)
    os.environ[_TRUST_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_TRUST_VARIABLE)
        if before is not None:
            os.environ[_TRUST_VARIABLE] = before


def _is_empty_object(value: Any) -> bool:
    if not isinstance(value, ShardedObject):
        return False
    return value.data is None or (isinstance(value.data, Tensor) and value.data.numel() == 0)


def optimizer_state(engine: MegatronEngine, model: dict[str, Any], *, is_loading: bool) -> dict[int, Any]:
    """Each optimizer's main parameters and moments, by the parameter's index in its buffers.

    Its parameter groups are not part of it: they follow from the configuration.
    """
    state = {}
    for index, optimizer in enumerate(optimizers(engine)):
        allocate(optimizer)
        with _offsets_without_padding(optimizer):
            state[index] = optimizer.sharded_param_state_fully_reshardable(model, is_loading, sharding_metadata(engine))
    return state


def optimizers(engine: MegatronEngine) -> list[DistributedOptimizer]:
    """megatron-core's distributed optimizers behind the engine's."""
    return getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])


def random_state() -> ShardedObject:
    """This rank's random states."""
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
    """Put back what `random_state` saw."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """The tensors of a sharded state dict, those that a factory makes (the gate and up halves of SwiGLU) included."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from nested_values(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


# The distributed optimizer.


def step_of_optimizer(engine: MegatronEngine) -> int:
    """How many updates the optimizer has made: less than the run's steps where some were skipped."""
    for optimizer in optimizers(engine):
        inner = optimizer.optimizer
        for state in inner.state.values():
            if "step" in state:  # torch's
                return int(state["step"])
        for group in inner.param_groups:
            if "step" in group:  # Transformer Engine's
                return int(group["step"])
    return 0


def set_step_of_optimizer(engine: MegatronEngine, step: int) -> None:
    """Make the optimizers go on from `step` updates."""
    for optimizer in optimizers(engine):
        inner = optimizer.optimizer
        if not _keeps_step_per_parameter(inner):
            for group in inner.param_groups:
                group["step"] = step
            continue
        for state in inner.state.values():
            # One tensor each: megatron-core's own loading lets all parameters share one, which then advances once per
            # parameter in every step.
            state["step"] = torch.tensor(float(step))


def _keeps_step_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def allocate(optimizer: DistributedOptimizer) -> None:
    """Give an optimizer that has not made a step yet its moments, zero.

    megatron-core's own way for torch's AdamW is a step with zero gradients, which decays the weights.
    """
    inner = optimizer.optimizer
    if inner.state:
        return
    if not _keeps_step_per_parameter(inner):
        optimizer.load_state_dict(optimizer.state_dict())
        for state in inner.state.values():
            for key in optimizer.optimizer_state_keys:
                state[key].zero_()
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            moments = {key: torch.zeros_like(parameter) for key in optimizer.optimizer_state_keys}
            inner.state[parameter] = {"step": torch.tensor(0.0), **moments}


@torch.no_grad()
def load_parameter_states(optimizer: DistributedOptimizer, loaded: dict[int, dict[str, Tensor]]) -> None:
    """Copy loaded main parameters and moments into this data-parallel rank's part of the optimizer.

    Args:
        loaded: by the parameter's index, {"param", "exp_avg", "exp_avg_sq"} in the parameter's shape. A parameter that
            is not there starts with what the model holds and zero moments.
    """
    for index, (parameter, part) in enumerate(_parameter_parts(optimizer)):
        if part is None:  # another data-parallel rank's
            continue
        group, order = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[group]["params"][order]
        targets = {key: optimizer.optimizer.state[main][key] for key in optimizer.optimizer_state_keys}
        if index in loaded:
            for key, target in {"param": main, **targets}.items():
                target.copy_(loaded[index][key].reshape(-1)[part.start : part.end])
            continue
        main.copy_(parameter.reshape(-1)[part.start : part.end])
        for target in targets.values():
            target.zero_()


def _parameter_parts(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, Any]]:
    """(parameter, the range of it that this rank's optimizer owns, or None), in the order of `param_state`."""
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        owned = {
            parameter: parts["param"]
            for buckets in ranges.values()
            for bucket in buckets
            for parameter, parts in bucket["param_map"].items()
        }
        for parameter in buffer.param_index_map:
            yield parameter, owned.get(parameter)


@contextmanager
def _offsets_without_padding(optimizer: DistributedOptimizer) -> Iterator[None]:
    """Within it, `fully_reshardable` saves the right elements of every bucket.

    megatron-core gathers the buckets without the padding between them, then cuts the parameters out at offsets that
    count the padding: all buckets but the first would be saved shifted, silently. A tied embedding in a pipeline has a
    bucket of its own, and overlapped gradient reduction makes more.
    """
    saved = [buffer.param_index_map for buffer in optimizer.buffers]
    try:
        for buffer in optimizer.buffers:
            padding, packed = [], 0
            for bucket in buffer.buckets:
                padding.append(bucket.offset - packed)
                packed += bucket.numel_unpadded
            buffer.param_index_map = {
                parameter: (start - padding[bucket], end - padding[bucket], bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, index_map in zip(optimizer.buffers, saved, strict=True):
            buffer.param_index_map = index_map
