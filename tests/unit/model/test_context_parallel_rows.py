"""Context parallelism without processes: which rows a rank holds, and its part of both attentions, gradients included.

What other ranks would send is cut out of the whole here; tests/distributed/test_context_parallel.py has real ranks.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_torch_attention import _LargestTensor
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.flop_counter import FlopCounterMode

from plt_megatron.config.schema import ModelConfig, ParallelConfig
from plt_megatron.model import torch_attention
from plt_megatron.model.context_parallel import SequenceShard, zigzag_runs
from plt_megatron.model.loop_context import Documents
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.model.torch_attention import causal_attention_of_runs, window_attention_of_runs
from plt_megatron.model.transformer_config import transformer_config
from tests.reference.plain_plt import attend


class Group:
    """What SequenceShard asks of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def rows_of(runs: list[range]) -> list[int]:
    return [row for run in runs for row in run]


# ---------------------------------------------------------------- which rows


@pytest.mark.parametrize(("cp", "length"), [(2, 8), (2, 4), (3, 24), (4, 8), (4, 64)])
def test_the_zigzag_is_megatron_cores(monkeypatch, cp, length):
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(Tensor, "cuda", lambda self, **kwargs: self)  # also on machines with a GPU
    positions = torch.arange(length)
    for rank in range(cp):
        monkeypatch.setattr(torch, "tensor", lambda data, device, pin_memory: torch.as_tensor(data))
        expected = rope_utils.get_pos_emb_on_this_cp_rank(positions, 0, Group(rank, cp))
        monkeypatch.undo()
        monkeypatch.setattr(Tensor, "cuda", lambda self, **kwargs: self)
        assert rows_of(zigzag_runs(length, cp, 1, rank)) == expected.tolist()
        rows = SequenceShard(Group(rank, cp), cp)  # type: ignore[arg-type]
        assert torch.equal(rows.select(positions, 0), expected)
        assert torch.equal(rows.select(positions.expand(2, -1), 1), expected.expand(2, -1))


@pytest.mark.parametrize(("cp", "tp", "length"), [(1, 4, 8), (2, 2, 8), (2, 2, 32), (2, 3, 12), (4, 2, 8), (3, 4, 24)])
def test_sequence_parallel_ranks_cut_a_context_parallel_ranks_rows_in_one_piece_each(cp, tp, length):
    seen = []
    for context_rank in range(cp):
        whole = rows_of(zigzag_runs(length, cp, 1, context_rank))
        parts = [zigzag_runs(length, cp, tp, context_rank * tp + part) for part in range(tp)]
        assert rows_of(list(itertools.chain(*parts))) == whole
        assert all(len(rows_of(part)) == length // (cp * tp) for part in parts)
        assert all(1 <= len(part) <= 2 and all(part) for part in parts)
        seen += whole
    assert sorted(seen) == list(range(length))


def test_the_last_ranks_two_chunks_are_one_run():
    assert zigzag_runs(16, 4, 1, 3) == [range(6, 10)]
    assert zigzag_runs(16, 4, 1, 0) == [range(2), range(14, 16)]


def test_without_parallelism_nothing_is_copied():
    rows = SequenceShard()
    whole = torch.arange(6)
    assert rows.select(whole, 0) is whole and rows.gather(whole) == (whole,)
    batch = MicroBatch(tokens=whole[None])
    assert batch.shard_for_cp(rows) is batch
    (before,) = rows.halo(3, whole)
    assert before[0].numel() == 0


def test_a_microbatch_is_cut_but_for_its_document_starts():
    tokens = torch.arange(16).view(2, 8)
    batch = MicroBatch(tokens, position_ids=tokens + 1, labels=tokens + 2, document_starts=tokens % 3 == 0)
    own = batch.shard_for_cp(SequenceShard(Group(0, 2), 2))  # type: ignore[arg-type]
    rows = [0, 1, 6, 7]
    assert torch.equal(own.tokens, tokens[:, rows]) and own.tokens.is_contiguous()
    assert torch.equal(own.position_ids, tokens[:, rows] + 1) and torch.equal(own.labels, tokens[:, rows] + 2)
    assert own.loss_mask is None and own.document_starts is batch.document_starts
    assert torch.equal(batch.tokens, tokens)


# ---------------------------------------------------------------- the attentions


def _draw(s: int, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(s)
    shapes = [(s, 2, heads, 8), (s, 2, groups, 8), (s, 2, groups, 8)]
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _starts(s: int) -> Tensor:
    """Documents across chunks, documents of one token beside every chunk's border, and one that fills a row."""
    starts = torch.rand(2, s, generator=torch.Generator().manual_seed(3)) < 0.1
    starts[0, s // 2 - 1 : s // 2 + 2] = True
    starts[1, 1:] = False
    starts[:, 0] = True
    return starts


def _of_ranks(inputs: list[Tensor], cp: int, window: int | None, documents: Documents | None, **options: Any) -> Tensor:
    """Each rank's part of the attention, put back into the sequence's order."""
    query, key, value = inputs
    out: list[tuple[int, Tensor]] = []
    for rank in range(cp):
        runs = zigzag_runs(query.shape[0], cp, 1, rank)
        own = [torch.cat([tensor[run.start : run.stop] for run in runs]) for tensor in inputs]
        if window is None:
            part = causal_attention_of_runs(own[0], key, value, runs, documents=documents, **options)
        else:
            before = [
                tuple(tensor[max(0, run.start - window + 1) : run.start] for tensor in (key, value)) for run in runs
            ]
            part = window_attention_of_runs(*own, before, runs, window_size=window, documents=documents, **options)
        out += zip(rows_of(runs), part, strict=True)
    return torch.stack([row for _, row in sorted(out, key=lambda item: item[0])])


def _with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def _assert_equals_whole(inputs: list[Tensor], cp: int, window: int | None, starts: Tensor | None) -> None:
    documents = None if starts is None else Documents(starts)
    none = torch.zeros(inputs[0].shape[1::-1], dtype=torch.bool)

    def whole(qkv: list[Tensor]) -> Tensor:
        out = attend(*(tensor.transpose(0, 1) for tensor in qkv), none if starts is None else starts, window)
        return out.transpose(0, 1)

    actual = _with_gradients(lambda qkv: _of_ranks(qkv, cp, window, documents), inputs)
    for one, other in zip(actual, _with_gradients(whole, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 6, 7, 9, 16, 17, 48, 64])
@pytest.mark.parametrize(("cp", "s"), [(2, 24), (3, 24), (4, 8), (4, 48)])
def test_the_ranks_attentions_are_the_wholes(cp, s, window, packed):
    _assert_equals_whole(_draw(s), cp, window, _starts(s) if packed else None)


@pytest.mark.parametrize("window", [None, 3, 11])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 3)])
def test_grouped_queries(heads, groups, window):
    _assert_equals_whole(_draw(24, heads, groups), 2, window, None)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_every_token_a_document(packed):
    s = 16
    inputs = _draw(s)
    starts = torch.ones(2, s, dtype=torch.bool)
    starts[1] = torch.arange(s) % 2 == 1
    for window in (None, 3):
        out = _of_ranks(inputs, 2, window, Documents(starts))
        # A token that sees itself alone gets its own value.
        torch.testing.assert_close(out[:, 0], inputs[2][:, 0].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("window", [None, 3, 9])
def test_softmax_scale_and_dtype(window):
    inputs = _draw(24)
    scaled = [inputs[0] * 0.5 * 8**0.5, *inputs[1:]]
    expected = _of_ranks(scaled, 2, window, None)
    torch.testing.assert_close(_of_ranks(inputs, 2, window, None, softmax_scale=0.5), expected)
    half = _of_ranks([tensor.bfloat16() for tensor in inputs], 2, window, None)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), _of_ranks(inputs, 2, window, None), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_long_runs_are_masked_a_few_rows_at_a_time(monkeypatch, packed):
    monkeypatch.setattr(torch_attention, "_MASKED_ROWS", 5)
    _assert_equals_whole(_draw(48), 2, None, _starts(48) if packed else None)


def test_the_mask_described_to_gpus_is_the_one_made_for_cpus():
    assert torch.equal(causal_lower_right(3, 7)._materialize(), torch_attention._lower_right(3, 7, torch.device("cpu")))


def _cost(s: int, cp: int, window: int | None) -> tuple[int, int]:
    """(FLOPs of the busiest rank, elements of the largest tensor), forward and backward."""
    query, key, value = _draw(s, dtype=torch.float32)
    worst, elements = 0, 0
    for rank in range(cp):
        runs = zigzag_runs(s, cp, 1, rank)
        own = [
            torch.cat([tensor[run.start : run.stop] for run in runs]).requires_grad_() for tensor in (query, key, value)
        ]
        before = [
            tuple(tensor[max(0, run.start - (window or 1) + 1) : run.start] for tensor in (key, value)) for run in runs
        ]
        whole = [tensor.clone().requires_grad_() for tensor in (key, value)]
        largest, flops = _LargestTensor(), FlopCounterMode(display=False)
        with largest, flops:
            if window is None:
                out = causal_attention_of_runs(own[0], *whole, runs)
            else:
                out = window_attention_of_runs(*own, before, runs, window_size=window)
            out.sum().backward()
        worst, elements = max(worst, flops.get_total_flops()), max(elements, largest.elements)
    return worst, elements


def test_a_rank_does_its_share_and_makes_no_score_matrix():
    s, cp, heads, d, b = 4096, 2, 4, 8, 2
    flops, elements = _cost(s, cp, None)
    # Half of s x s pairs are seen; a rank has 1 / cp of them, and of the diagonal's blocks all.
    blocks = torch_attention._MASKED_ROWS
    assert flops <= 7 * 2 * b * heads * d * (s * s // 2 + s * blocks) / cp
    assert elements <= max(blocks * s, s * b * heads * d)
    window = 16
    flops, elements = _cost(s, cp, window)
    assert flops <= 6 * 2 * (s // cp) * 2 * window * heads * d * b
    assert elements <= b * heads * (s // cp) * 2 * window


# ---------------------------------------------------------------- Transformer Engine


class FakeDotProductAttention(torch.nn.Module):
    """Keeps what it is built with."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.built_with = kwargs


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("cp", "expected"), [(1, [None, None]), (2, ["all_gather", "a2a"]), (4, ["p2p", "all_gather"])]
)
def test_te_attentions_communicate_as_configured(monkeypatch, cp, expected):
    from megatron.core.extensions import transformer_engine
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from plt_megatron.model import te_attention
    from plt_megatron.model.attention import TEGatedAttention

    monkeypatch.setattr(te_attention, "require_transformer_engine", lambda: None)
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", FakeDotProductAttention)
    kinds = {} if cp == 1 else {"cp_comm_type": expected[0], "window_cp_comm_type": expected[1]}
    parallel = ParallelConfig(context_parallel_size=cp, **kinds)  # type: ignore[arg-type]
    config = transformer_config(ModelConfig(num_layers=2, hidden_size=16, backend="torch"), parallel)
    attention = TEGatedAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    parts = (attention.global_attention, attention.local_attention)
    built = [part.attention.built_with for part in parts]  # type: ignore[union-attr]
    assert [kwargs.get("cp_comm_type") for kwargs in built] == expected
    assert [kwargs["config"].window_size for kwargs in built] == [None, (63, 0)]
    assert config.window_size is None and config.cp_comm_type == parallel.cp_comm_type
