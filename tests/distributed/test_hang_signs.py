"""The counts that show which rank is behind are torch's own."""

from __future__ import annotations

import json
import os


def counts_around_a_collective_that_rank_1_is_late_for() -> list[dict[str, int]]:
    """Rank 0's and rank 1's counts, told over the store alone, before rank 1 comes to the collective."""
    import torch
    import torch.distributed as dist

    from plt_megatron.launcher.watchdog import collectives_started

    rank, group = int(os.environ["RANK"]), dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    waiting = dist.all_reduce(torch.ones(1), group=group, async_op=True) if rank == 0 else None
    store = dist.distributed_c10d._get_default_store()
    store.set(f"counts/{rank}", json.dumps(collectives_started(("gloo",))))
    counts = [json.loads(store.get(f"counts/{other}")) for other in range(2)]
    (waiting or dist.all_reduce(torch.ones(1), group=group, async_op=True)).wait()
    assert collectives_started() == {}, "gloo's are not compared: they count messages between two ranks, too"
    dist.destroy_process_group(group)
    return counts


def test_a_rank_that_has_not_come_to_a_collective_has_a_smaller_count(run_distributed):
    first, late = run_distributed(counts_around_a_collective_that_rank_1_is_late_for, 2)
    assert [first[name] - late[name] for name in first].count(1) == 1
    assert set(first) == set(late) and all(first[name] >= late[name] for name in first)
