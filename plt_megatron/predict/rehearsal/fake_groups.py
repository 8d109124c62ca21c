"""torch.distributed for one rank of a world that does not exist.

torch's `fake` process group completes every collective at once. Groups without this rank are counted, not created:
creating those of 8,192 ranks would take minutes and change nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from plt_megatron.predict.rehearsal.record import Log

# Number of groups the world creates, by megatron-core's description.
groups_made: Counter[str] = Counter()
_new_group = dist.new_group


def join_fake_world(rank: int, world_size: int, log: Log) -> None:
    """Become `rank` of `world_size` ranks, in a process that does nothing else. `log` records exchanges of Python
    objects, to which all ranks are assumed to contribute the same."""

    def all_gather_object(found: list[Any], given: Any, group: Any = None) -> None:
        log.add_objects("all_gather_object", group)
        found[:] = [given] * len(found)

    def gather_object(given: Any, found: list[Any] | None = None, dst: Any = None, group: Any = None, **_: Any) -> None:
        log.add_objects("gather_object", group)
        if found is not None:
            found[:] = [given] * len(found)

    def broadcast_object_list(objects: list[Any], src: Any = None, group: Any = None, **_: Any) -> None:
        log.add_objects("broadcast_object_list", group)

    for function in (all_gather_object, gather_object, broadcast_object_list):
        setattr(dist, function.__name__, function)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    _note_waits(log)
    dist.new_group = _new_fake_group  # type: ignore[assignment]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


@dataclass
class _Message:
    """Work handle that isend and irecv return."""

    log: Log
    position: int
    work: Any

    def wait(self, *args: Any) -> bool:
        self.log.add_wait(self.position)
        return True

    def is_completed(self) -> bool:
        return True


def _note_waits(log: Log) -> None:
    for name in ("isend", "irecv"):
        stock = getattr(dist, name)

        def message(*args: Any, stock: Any = stock, **kwargs: Any) -> _Message:
            work = stock(*args, **kwargs)
            return _Message(log, len(log.calls) - 1, work)

        setattr(dist, name, message)

    def batch_isend_irecv(p2p_op_list: list[dist.P2POp]) -> list[Any]:
        return [each.op(each.tensor, each.peer, each.group, each.tag) for each in p2p_op_list]

    dist.batch_isend_irecv = batch_isend_irecv


def share_rank_lists() -> None:
    """Cache megatron-core's lists of ranks, so that processes forked after the first computation reuse them."""
    from megatron.core import parallel_state

    stock = parallel_state.generate_masked_orthogonal_rank_groups

    @lru_cache
    def cached(world_size: int, parallel_size: tuple[int, ...], mask: tuple[bool, ...]) -> list[list[int]]:
        return stock(world_size, list(parallel_size), list(mask))

    parallel_state.generate_masked_orthogonal_rank_groups = lambda world_size, parallel_size, mask: cached(
        world_size, tuple(parallel_size), tuple(mask)
    )


class _Parts:
    """A buffer's equal parts, one per data-parallel rank, each created when asked for. megatron-core builds a list of
    all, though a rank uses only its own, and a thousand views of a fake tensor take seconds."""

    def __init__(self, buffer: Tensor, data_parallel_world_size: int) -> None:
        assert buffer.numel() % data_parallel_world_size == 0
        self._buffer, self._size = buffer, buffer.numel() // data_parallel_world_size

    def __getitem__(self, rank: int) -> Tensor:
        return self._buffer[rank * self._size : (rank + 1) * self._size]


def share_out_lazily() -> None:
    """Create buffers' parts on demand, in this process and all forked from it."""
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer.shard_buffer = _Parts


def _new_fake_group(ranks: list[int] | None = None, *args: Any, backend: Any = None, **kwargs: Any) -> Any:
    description = kwargs.get("group_desc") or "undefined"
    groups_made[description] += 1
    if ranks is not None and dist.get_rank() not in ranks:
        return dist.GroupMember.NON_GROUP_MEMBER
    return _new_group(ranks, backend="fake", group_desc=description)
