"""The cross-loop shift and the attentions over ranks that share a sequence, against the unsharded functions, gradients
included; and what travels between the ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plt_megatron.config.schema import ModelConfig, ParallelConfig

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # by name: put together from the ranks, unsharded


def _starts(rows: int, chunks: int) -> Any:
    """Documents of one token where chunks meet, documents across chunks, and a row that is one document."""
    import torch

    starts = torch.rand(3, rows, generator=torch.Generator().manual_seed(1)) < 0.15
    starts[0, :: rows // chunks] = True
    starts[0, 1 :: rows // chunks] = True
    starts[1, rows // chunks - 1 :: rows // chunks] = True
    starts[2, 1:] = False
    return starts


def _rows(context_ranks: int) -> Any:
    import torch.distributed as dist

    from plt_megatron.model.context_parallel import SequenceShard

    return SequenceShard(dist.group.WORLD, context_ranks, dist.get_world_size() // context_ranks)


def _together(part: Any, rows: Any, length: int) -> np.ndarray:
    """Every rank's rows in the sequence's order."""
    import torch
    import torch.distributed as dist

    from plt_megatron.model.context_parallel import zigzag_runs

    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    whole = torch.full((length, *part.shape[1:]), torch.nan, dtype=part.dtype)
    for rank, tensor in enumerate(parts):
        runs = zigzag_runs(length, rows.context_ranks, rows.sequence_ranks, rank)
        whole[[row for run in runs for row in run]] = tensor
    return whole.numpy()


def _compare(own: list[Any], shard_for_cp: Any, whole: list[Any], of_whole: Any, rows: Any) -> Pairs:
    """Outputs and gradients of a weighted sum of them."""
    import torch

    length = whole[0].shape[0]
    own = [tensor.clone().requires_grad_() for tensor in own]
    whole = [tensor.clone().requires_grad_() for tensor in whole]
    expected = of_whole(*whole)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=expected.dtype)
    (expected * weights).sum().backward()
    actual = shard_for_cp(*own)
    (actual * rows.select(weights, 0)).sum().backward()
    pairs = {"output": (_together(actual, rows, length), expected.detach().numpy())}
    for index, (one, other) in enumerate(zip(own, whole, strict=True)):
        pairs[f"gradient {index}"] = _together(one.grad, rows, length), other.grad.numpy()
    return pairs


def compare_shift(context_ranks: int, length: int) -> list[Pairs]:
    """Without and with documents."""
    import torch

    from plt_megatron.model.loop_input import shift

    rows = _rows(context_ranks)
    whole = torch.randn(length, 3, 5, generator=torch.Generator().manual_seed(0))

    def compare(starts: Any) -> Pairs:
        return _compare(
            [rows.select(whole, 0)], lambda x: shift(x, starts, rows), [whole], lambda x: shift(x, starts), rows
        )

    # Without context parallelism a document begins where a slice does.
    return [compare(None), compare(_starts(length, 2 * context_ranks if context_ranks > 1 else rows.size))]


def compare_attention(length: int, windows: list[int | None]) -> list[Pairs]:
    """The layer's attention module on this rank against the unsharded functions: each window, without and with
    documents. None: the global one."""
    import torch
    import torch.distributed as dist

    from plt_megatron.model.attention import TorchAttention
    from plt_megatron.model.loop_context import Documents
    from plt_megatron.model.torch_attention import causal_attention, window_attention

    rows = _rows(dist.get_world_size())
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(length, 3, heads, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    own = [rows.select(tensor, 0) for tensor in whole]

    def compare(window: int | None, documents: Documents | None) -> Pairs:
        module = TorchAttention(window, softmax_scale=None, pg_collection=SimpleNamespace(cp=dist.group.WORLD))
        if window is None:
            return _compare(
                own,
                lambda query, *kv: module(query, *rows.gather(*kv), documents),
                whole,
                lambda *qkv: causal_attention(*qkv, documents=documents),
                rows,
            )
        return _compare(
            own,
            lambda *qkv: module(*qkv, documents),
            whole,
            lambda *qkv: window_attention(*qkv, window_size=window, documents=documents),
            rows,
        )

    packed = Documents(_starts(length, 2 * rows.size))
    return [compare(window, documents) for window in windows for documents in (None, packed)]


def _assert_equal(ranks: list[list[Pairs]], tolerance: float) -> None:
    for results in ranks:
        for number, pairs in enumerate(results):
            for name, (actual, expected) in pairs.items():
                message = f"comparison {number}, {name}"
                np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=message)


@pytest.mark.parametrize(
    ("ranks", "context_ranks", "length"),
    [
        *((1, 1, 4), (2, 1, 2), (2, 1, 8), (4, 1, 4), (4, 1, 8)),
        *((2, 2, 4), (2, 2, 24), (3, 3, 18), (4, 4, 8), (4, 4, 40)),
        *((4, 2, 4), (4, 2, 16), (6, 2, 12), (8, 4, 8), (8, 4, 48)),
    ],
    ids=str,
)
def test_shift(run_distributed, ranks, context_ranks, length):
    """Sequence-parallel ranks, context-parallel ones, and both: then a rank's rows may span both chunks."""
    _assert_equal(run_distributed(compare_shift, ranks, context_ranks, length, all_ranks=True), tolerance=0)


@pytest.mark.parametrize(("ranks", "length"), [(2, 24), (3, 24), (4, 8), (4, 48)])
def test_attention(run_distributed, ranks, length):
    """Windows shorter and longer than a chunk, than several chunks, than the sequence; odd and even."""
    windows = [None, 1, 2, 3, 5, 6, 7, 8, 13, 23, length + 1]
    _assert_equal(run_distributed(compare_attention, ranks, length, windows, all_ranks=True), tolerance=1e-10)


# ---------------------------------------------------------------- what travels


def _sent(calls: list[Any]) -> list[tuple[str, int]]:
    """Each collective's name and how many elements this rank sends to others, or of a gathered tensor's its own."""
    sent = []
    for call in calls:
        if call.operation == "all_to_all":
            rows = call.splits[0]
            sent.append((call.operation, call.elements * (sum(rows) - rows[call.place]) // sum(rows)))
        elif call.operation in ("all_gather", "reduce_scatter"):
            sent.append((call.operation, call.elements // call.ranks[1]))
    return sent


def traffic(window: int, loops: int, length: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Record what a rank sends in the forward and in the backward pass of a one-layer model over one row."""
    import torch
    import torch.distributed as dist
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch
    from plt_megatron.model.transformer_config import transformer_config
    from plt_megatron.runtime.process_groups import init_process_groups
    from tests.distributed.rehearsal_jobs import recorded

    parallel = ParallelConfig(context_parallel_size=dist.get_world_size())
    init_process_groups(parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, loop_count=loops, window_size=window
    )
    stage = LoopedGPT(
        transformer_config(model, parallel), 64, length, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with recorded() as forward:
        losses = stage(MicroBatch(tokens, labels=tokens).shard_for_cp(stage.context_rows))
    with recorded() as backward:
        losses.sum().backward()
    return _sent(forward.calls), _sent(backward.calls)


def test_only_boundary_rows_travel_but_for_one_gather_of_k_and_v(run_distributed):
    """Each of 4 ranks holds 16 of 64 rows, in two chunks (the last rank's are one run). A row of K and V is 2 x 2 x 4
    elements; each border between ranks' chunks is crossed by `window - 1` of them and by one hidden state of 16."""
    window, loops, row, own = 4, 3, 16, 16
    ranks = run_distributed(traffic, 4, window, loops, 64, all_ranks=True)
    for rank, (forward, backward) in enumerate(ranks):
        borders = 1 if rank in (0, 3) else 2  # from chunk r to rank r + 1, from chunk 7 - r to rank r - 1
        later = [("all_to_all", borders * row), ("all_to_all", borders * (window - 1) * row)]
        assert forward == [("all_gather", own * row), *later * (loops - 1)]
        received = [("all_to_all", borders * (window - 1) * row), ("all_to_all", borders * row)]
        assert backward == [*received * (loops - 1), ("reduce_scatter", own * row)]
