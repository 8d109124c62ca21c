"""Context parallelism without processes: which rows a rank holds, and how Transformer Engine is told to exchange them.
`test_torch_attention` has a rank's part of both attentions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from plt_megatron.config.schema import ModelConfig, ParallelConfig
from plt_megatron.model.context_parallel import SequenceShard, zigzag_runs
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.model.transformer_config import transformer_config


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
    from plt_megatron.model.attention import GatedSlidingWindowAttention

    monkeypatch.setattr(te_attention, "require_transformer_engine", lambda: None)
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", FakeDotProductAttention)
    kinds = {} if cp == 1 else {"cp_comm_type": expected[0], "window_cp_comm_type": expected[1]}
    parallel = ParallelConfig(context_parallel_size=cp, **kinds)  # type: ignore[arg-type]
    config = transformer_config(ModelConfig(num_layers=2, hidden_size=16, backend="torch"), parallel)
    config.backend = "te"
    attention = GatedSlidingWindowAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    parts = (attention.global_attention, attention.local_attention)
    built = [part.attention.built_with for part in parts]  # type: ignore[union-attr]
    assert [kwargs.get("cp_comm_type") for kwargs in built] == expected
    assert [kwargs["config"].window_size for kwargs in built] == [None, (63, 0)]
    assert config.window_size is None and config.cp_comm_type == parallel.cp_comm_type
