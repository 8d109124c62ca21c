"""Plan of who writes which part of a checkpoint: one rank makes it for its whole pipeline stage.

Sharded tensors come from the saving code, run as if on another rank: the optimizer's tensors for every rank; the
model's for the first ranks along data parallelism, which write them, and for the last rank, which must not.
Data-parallel ranks divide what all of them hold as in megatron-core, whose own algorithm is quadratic in their number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range
from torch import Tensor

from plt_megatron.config.layout import ParallelLayout
from plt_megatron.predict.rehearsal.matching import group_of
from plt_megatron.predict.rehearsal.record import Saving, described
from plt_megatron.run_folder.checkpoints import EMA
from plt_megatron.train.checkpoint.megatron_state import OptimizerPart
from plt_megatron.train.checkpoint.state import KEPT_PREFIX, model_state, sharded_tensors
from plt_megatron.train.megatron_engine import MegatronEngine

Shared = tuple[ShardedTensor, Sequence[int]]  # a tensor, and the ranks among which such tensors are divided


def plan_saving(engine: MegatronEngine, layout: ParallelLayout, first_rank: int) -> Saving:
    """Plan what the ranks of a pipeline stage write of the model and of the optimizers' state.

    Args:
        engine: the engine of `first_rank`, the rank of this process.
    """
    stage = range(first_rank, first_rank + layout.ranks_per_stage)
    asked = [*stage[: max(layout.tensor, layout.expert)], stage[-1]]
    models = {rank: _model_of(engine, layout, rank) for rank in asked}
    saving = Saving(written=dict.fromkeys(stage, 0))
    for part in engine.state.parts:
        assert _ranges(PartOfOtherRank(part, 0)) == _ranges(part), "the first rank's own part is another"
        for place, rank in enumerate(stage):
            apart = layout.ranks_per_stage // part.optimizer.data_parallel_group.size()
            optimizer = PartOfOtherRank(part, place // apart)
            model = models[stage[place % apart]]
            states: list[dict] = [optimizer.sharded(model)]
            if engine.config.training.ema_decay is not None:
                states.append(optimizer.sharded_beside(model, optimizer.pieces(), f"{KEPT_PREFIX}{EMA}."))
            for tensor in _written(dict(enumerate(states))):
                _write(saving, tensor, rank)
    shared = [each for rank, model in models.items() for each in _to_share(model, stage, rank, layout)]
    for tensor, rank in share(shared, saving.written):
        _write(saving, tensor, rank)
    return saving


def _ranges(part: OptimizerPart) -> list[tuple[int, int] | None]:
    return [None if own is None else (own.start, own.end) for _, own in part.parameter_parts()]


def _to_share(model: Mapping[str, Any], stage: range, rank: int, layout: ParallelLayout) -> Iterator[Shared]:
    """Yield the model's tensors that this rank's group of data-parallel ranks writes."""
    for name, value in model.items():
        is_expert = not getattr(value.data, "allreduce", True)  # as megatron-core marks them
        apart = math.lcm(layout.tensor, layout.expert) if is_expert else layout.tensor
        for tensor in _written({name: value}):
            yield tensor, stage[rank - stage[0] :: apart]


def _written(state: Any) -> Iterator[ShardedTensor]:
    return (tensor for tensor in sharded_tensors(state) if is_main_replica(tensor.replica_id))


def share(tensors: Sequence[Shared], load: Mapping[int, int]) -> Iterator[tuple[ShardedTensor, int]]:
    """Assign each tensor to a rank as megatron-core's `distribute_shards_to_ranks` does: tensors that few ranks hold
    first, then the largest, each to the rank with the least to write so far.

    Args:
        load: bytes that each rank writes; the caller adds each yielded tensor before it asks for the next.
    """

    def order(shared: Shared) -> tuple[Any, ...]:
        tensor, holders = shared
        return len(holders), -_bytes(tensor), tensor.key, tensor.global_offset

    for tensor, holders in sorted(tensors, key=order):
        yield tensor, min(holders, key=lambda rank: (load[rank], rank))


def _write(saving: Saving, tensor: ShardedTensor, rank: int) -> None:
    _, boxes = saving.tensors.setdefault(tensor.key, (tuple(tensor.global_shape), []))
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    boxes.append((tuple(tensor.global_offset), shape, rank))
    saving.written[rank] += _bytes(tensor)


def _bytes(tensor: ShardedTensor) -> int:
    return math.prod(tensor.local_shape) * tensor.dtype.itemsize


def _model_of(engine: MegatronEngine, layout: ParallelLayout, rank: int) -> dict[str, Any]:
    """Return the model's sharded tensors as on a rank of this stage, with factories built once."""
    with _as_rank(rank, layout):
        model = model_state(engine.stage)
        return {name: _built(value) for name, value in model.items() if hasattr(value, "data")}


def _built(value: Any) -> Any:
    if not isinstance(value, ShardedTensorFactory):
        return value
    built = value.build()
    return replace(value, build_fn=lambda *_: built)


@contextlib.contextmanager
def _as_rank(rank: int, layout: ParallelLayout) -> Iterator[None]:
    """Make this process appear as another rank of its stage."""

    def place(group: dist.ProcessGroup) -> int:
        if group.size() == 1:
            return 0
        if group.size() == layout.world_size:
            return rank
        ranks = group_of(rank, layout, described(group))
        assert ranks is not None, f"saving asks for the rank in {described(group)}"
        return ranks.index(rank)

    def get_rank(group: Any = None) -> int:
        chosen = group or dist.group.WORLD
        assert chosen is not None, "the default process group exists"
        return place(chosen)

    with mock.patch.object(dist.ProcessGroup, "rank", place), mock.patch.object(dist, "get_rank", get_rank):
        yield


class PartOfOtherRank(OptimizerPart):
    """An optimizer as on another data-parallel rank, with tensors that have no memory.

    Args:
        part: this rank's optimizer.
        place: position of the other rank among the ranks that shard the optimizer's state.
    """

    def __init__(self, part: OptimizerPart, place: int) -> None:
        vars(self).update(vars(part))
        self._place = place
        self._sizes: dict[Tensor, int] = {}

    def allocate(self) -> None:
        """Do nothing: these tensors have no memory."""

    def parameter_parts(self) -> Iterator[tuple[Tensor, Any]]:
        for buffer in self.optimizer.buffers:
            owned: dict[Tensor, Any] = {}
            for bucket in buffer.buckets:
                size = bucket.grad_data.numel() // buffer.data_parallel_group.size()
                start = bucket.offset + self._place * size
                ranges = DistributedOptimizer._build_model_gbuf_param_range_map(
                    buffer.param_index_map, Range(start, start + size), bucket.offset
                )
                owned |= {parameter: parts["param"] for parameter, parts in ranges.items()}
            for parameter in buffer.param_index_map:
                part = owned.get(parameter)
                if part is not None:
                    self._sizes[parameter] = part.size
                yield parameter, part

    def main_parameter(self, parameter: Tensor) -> Tensor:
        return torch.empty(self._sizes[parameter], device="meta")

    def _tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        names = "param", *self._keys(parameter)
        return {name: self.main_parameter(parameter) for name in names}
