"""Which rank is named when a job hangs, from what each rank has told of itself."""

from __future__ import annotations

import traceback

from plt_megatron.launcher.signs import Sign, collective, describe_hang, position, ranks_behind


def sign(rank: int, waits_in: str | None = None, at: str = "engine.py", turn: int = 9, **collectives: int) -> Sign:
    return Sign(rank, f"n{rank}", 9, 4, "training", 30.0, waits_in, f"{at}:{rank}", turn, collectives)


def eight(**stuck: str) -> list[Sign]:
    """Eight ranks under NCCL, tensor parallel in pairs and data parallel over the pairs, which have run ahead to where
    the host needs a value: in no collective. `rank_N="data"` is stuck before its step began, `rank_N="forward"` in it.
    """
    signs = []
    for rank in range(8):
        tensor, data, where = f"tensor{rank // 2}", f"data{rank % 2}", stuck.get(f"rank_{rank}")
        peer = stuck.get(f"rank_{rank ^ 1}")
        if where == "data":
            signs.append(sign(rank, at="sampling.py", turn=8, **{tensor: 100, data: 20}))
        elif where == "forward":
            signs.append(sign(rank, at="attention.py", **{tensor: 103, data: 20}))
        elif peer is not None:  # its first collective that the peer has not started
            signs.append(sign(rank, at="router.py", **{tensor: 101 if peer == "data" else 104, data: 20}))
        else:
            signs.append(sign(rank, at="optimizer.py", **{tensor: 140, data: 21}))
    return signs


def test_a_rank_stuck_in_its_data_is_named_where_collectives_return_at_once():
    text = describe_hang(eight(rank_5="data"))
    assert text == "step 5 has not moved for 30 s: the others wait for rank 5 on n5, training, at sampling.py:5"


def test_so_is_one_that_is_stuck_in_the_middle_of_a_step():
    assert describe_hang(eight(rank_2="forward")).endswith(
        "the others wait for rank 2 on n2, training, at attention.py:2"
    )


def test_two_ranks_behind_are_both_named():
    assert [found.rank for found in ranks_behind(eight(rank_2="data", rank_5="data"))] == [2, 5]
    text = describe_hang(eight(rank_2="data", rank_5="forward"))
    assert "wait for rank 2 on n2, training, at sampling.py:2; rank 5 on n5, training, at attention.py:5" in text


def test_nobody_is_named_where_all_are_equally_far_and_all_are_shown():
    text = describe_hang(eight())
    assert "no rank is behind the others: rank 0 on n0, training, at optimizer.py:0; rank 1" in text
    assert "rank 7 on n7" in text and "wait" not in text


def test_a_long_list_of_ranks_is_cut():
    assert describe_hang([sign(rank) for rank in range(64)]).endswith("at engine.py:7; and 56 more")


def test_ranks_that_wait_for_one_another_are_not_behind():
    """Two collectives in another order."""
    crossed = [sign(0, a=5, b=7), sign(1, a=6, b=6)]
    assert ranks_behind(crossed) == [] and "no rank is behind" in describe_hang(crossed)


def test_a_barrier_that_some_wait_in_does_not_hide_who_is_behind():
    """NCCL's barrier keeps its caller; rank 1 waits for a value on its GPU, rank 2 is the one that both wait for."""
    signs = [sign(0, "barrier", world=8), sign(1, world=8), sign(2, world=7)]
    assert describe_hang(signs).endswith("the others wait for rank 2 on n2, training, at engine.py:2")


def test_the_rank_outside_the_collective_is_the_one_the_others_wait_for():
    text = describe_hang([sign(0, "all_reduce"), sign(1), sign(2, "all_reduce")])
    assert text == "step 5 has not moved for 30 s: the others wait for rank 1 on n1, training, at engine.py:1"


def test_a_later_stage_that_waits_for_its_first_input_is_not_behind():
    """gloo: rank 0, the first stage, is stuck in its first microbatch, before the second stage has one."""
    text = describe_hang([sign(0, turn=9), sign(1, "recv", turn=8)])
    assert text.endswith("the others wait for rank 0 on n0, training, at engine.py:0")


def test_collectives_that_do_not_match_are_all_shown():
    text = describe_hang([sign(0, "all_reduce"), sign(1, "barrier")])
    assert "all ranks wait in collectives" in text and "rank 0 on n0, training, in all_reduce at" in text
    assert "rank 1 on n1, training, in barrier" in text


def test_a_stack_tells_its_collective_and_our_innermost_line():
    frames = [
        traceback.FrameSummary("/x/plt_megatron/train/megatron_engine.py", 10, "_run", line="self._reduce()"),
        traceback.FrameSummary("/x/plt_megatron/train/megatron_engine.py", 20, "_reduce", line="dist.all_reduce(t)"),
        traceback.FrameSummary("/y/torch/distributed/distributed_c10d.py", 5, "all_reduce", line="work.wait()"),
    ]
    assert collective(frames) == "all_reduce"
    assert position(frames) == "megatron_engine.py:20 _reduce (in all_reduce)"
    assert collective(frames[:2]) is None
    assert position([]) == "an unknown place"
