"""The plan of a save: who writes what, and whether all is written once."""

from __future__ import annotations

import random
from typing import Any

import pytest

from plt_megatron.predict.rehearsal.compare import saving_problems
from plt_megatron.predict.rehearsal.record import Box, Saving


def problems(*boxes: Box, shape: tuple[int, ...] = (4, 6)) -> list[str]:
    return saving_problems([Saving({"w": (shape, list(boxes))})])


def test_a_tensor_that_is_written_once_is_no_problem():
    """Rows divided in the middle, as optimizers' parts are, and columns, as tensor-parallel ranks hold them."""
    assert problems(((0, 0), (1, 6), 0), ((1, 0), (1, 2), 0), ((1, 2), (1, 4), 1), ((2, 0), (2, 6), 1)) == []
    assert problems(((0, 0), (4, 3), 0), ((0, 3), (3, 3), 1), ((3, 3), (1, 3), 2)) == []
    assert problems(((), (), 5), shape=()) == []


def test_what_nobody_writes_and_what_two_write_is_named():
    assert problems(((0, 0), (4, 3), 0), ((0, 3), (3, 3), 1)) == ["checkpoint: nobody writes w[3:4, 3:6]"]
    assert problems(((0, 0), (3, 6), 7), ((2, 0), (2, 6), 9)) == ["checkpoint: ranks 7 and 9 both write w[2:3, 0:6]"]
    assert problems() == ["checkpoint: nobody writes w[0:4, 0:6]"]
    assert len(problems(*(((row, 0), (1, 5), 0) for row in range(4)))) == 3, "a few of each tensor"


def test_stages_together_write_a_tensor():
    first = Saving({"w": ((2, 3), [((0, 0), (1, 3), 0)])})
    assert saving_problems([first, Saving({"w": ((2, 3), [((1, 0), (1, 3), 1)])})]) == []
    (problem, *_) = saving_problems([first, Saving({"w": ((2, 4), [((1, 0), (1, 3), 1)])})])
    assert "disagree on the shape of w: [2, 3] and [2, 4]" in problem


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
