"""The plan of a save: who writes what."""

from __future__ import annotations

import random
from typing import Any

import pytest


@pytest.mark.parametrize("seed", range(3))
def test_ranks_share_the_writing_as_in_megatron_core(seed):
    from megatron.core.dist_checkpointing.exchange_utils import distribute_shards_to_ranks

    from plt_megatron.predict.rehearsal.saving import share

    draw = random.Random(seed)
    ranks = range(8)
    names = [f"w{number}" for number in range(30)]
    holders = {name: ranks[draw.choice((0, 1)) :: draw.choice((1, 2))] for name in names}
    sizes = {name: draw.choice((8, 8, 64, 72, 4096)) for name in names}
    expected = distribute_shards_to_ranks(
        {(name, (0,)): list(holders[name]) for name in names}, shard_sizes(sizes), 8, set()
    )
    load = dict.fromkeys(ranks, 0)
    found = {}
    for tensor, rank in share([(tensor_of(name, sizes[name]), holders[name]) for name in names], load):
        found[tensor.key, (0,)] = rank
        load[rank] += sizes[tensor.key]
    assert found == expected and len(set(found.values())) == 8


def shard_sizes(sizes: dict[str, int]) -> dict[Any, int]:
    return {(name, (0,)): size for name, size in sizes.items()}


def tensor_of(key: str, size: int) -> Any:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, torch.empty(size // 4, device="meta"))
