from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import BatchStage, DataConfig, DataSource, RunConfig
from plt_megatron.data.mix import SourceShare
from plt_megatron.errors import UserError
from plt_megatron.train import data
from plt_megatron.train.data import batches, collate, micro_batch_indices


class Numbers:
    """Sample i is [i, i]; remembers what was asked for."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.length
        self.asked.append(index)
        return {"tokens": torch.tensor([index, index]), "loss_mask": torch.ones(2)}


def indices(
    length: int,
    consumed: int,
    micro: int,
    total: int | list[int],
    rank: int = 0,
    ranks: int = 1,
    wrap_to: int | None = None,
) -> Iterator[list[int]]:
    return micro_batch_indices(
        length,
        consumed_samples=consumed,
        micro_batch_size=micro,
        global_batch_sizes=repeat(total) if isinstance(total, int) else total,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        wrap_to=wrap_to,
    )


def numbers(
    length: int, consumed: int, micro: int, total: int, rank: int = 0, ranks: int = 1, prefetch: int = 1
) -> list[list[int]]:
    found = batches(Numbers(length), indices(length, consumed, micro, total, rank, ranks), prefetch)
    return [batch["tokens"][:, 0].tolist() for batch in found]


def test_a_tokenizer_that_does_not_tell_its_bytes_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be at its first validation by source: losses are then in nats alone."""
    monkeypatch.setattr(data.dist, "get_rank", lambda: 0)
    run = data.RunData.__new__(data.RunData)
    run._count_bytes = data._byte_counter(Mock(byte_lengths=Mock(side_effect=UserError("no bytes"))))
    assert run.validation_bytes("text") is None


def test_bytes_are_those_of_the_text_without_a_space_that_the_tokenizer_adds() -> None:
    """Tokens of 0 (the end), 3, 2 and 4 bytes; the last begins a document that counts, the second one that does not."""
    lengths = torch.tensor([0, 3, 2, 4]).numpy()
    tokenizer = Mock(byte_lengths=lambda: lengths, prefix_bytes=lambda lengths: 1, eod=0)
    count = data._byte_counter(tokenizer)
    sample = {"tokens": torch.tensor([0, 1, 2, 0]), "labels": torch.tensor([1, 2, 0, 3])}
    sample["loss_mask"] = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert count is not None and count(sample, None) == 2 + 0 + 3
    assert count(sample, 1) == 1 + 0 + 4, "a source with another token at the end of its documents"


def test_the_token_that_ends_a_validation_sources_documents_is_its_manifests(tmp_path: Path) -> None:
    (tmp_path / "two.manifest.json").write_text('{"tokenizer": {"eod": 7}}')
    sources = [DataSource(str(tmp_path / name)) for name in ("one", "two")]
    assert data._document_ends(DataConfig(validation_sources=sources)) == {"one": None, "two": 7}


def test_by_source_the_table_has_each_sources_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of a mix of them, which the run does not read."""
    run = data.RunData.__new__(data.RunData)
    run._config = RunConfig(data=DataConfig(validation_sources=[DataSource("a"), DataSource("b")]))
    share = SourceShare("train", "a", "a", 1.0, 0, 9, 90, 5, 2.0, None)
    run._shares = [share, replace(share, part="validation", samples=1)]

    def build(alone: RunConfig, samples: tuple[int, int, int], tokenizer: Any) -> Any:
        (source,) = alone.data.validation_sources
        return Mock(shares=[replace(share, part="validation", name=source.path, samples=samples[1])])

    run.tokenizer = None
    monkeypatch.setattr(data, "build_datasets", build)
    assert list(run._build_by_source(8)) == ["a", "b"]
    assert [(each.part, each.name, each.samples) for each in run._shares] == [
        ("train", "a", 5),
        ("validation", "a", 8),
        ("validation", "b", 8),
    ]


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (12, 1), (1, 4), (3, 2), (6, 2), (1, 12)])
def test_global_batches_are_the_same_in_every_layout(micro: int, ranks: int) -> None:
    """The union over ranks of each step's microbatches: 12 consecutive samples, each once."""
    per_rank = [numbers(100, 0, micro, 12, rank, ranks) for rank in range(ranks)]
    steps = 12 // (micro * ranks)
    assert all(len(found) == 8 * steps for found in per_rank)
    for step in range(8):
        parts = [found[step * steps : (step + 1) * steps] for found in per_rank]
        together = sorted(index for part in parts for batch in part for index in batch)
        assert together == list(range(12 * step, 12 * step + 12))
    assert all(len(batch) == micro for found in per_rank for batch in found)


def test_batches_of_several_sizes_are_shared_out_alike() -> None:
    """Samples go on where they were, whatever the sizes before and the ranks."""
    sizes = [4, 4, 8, 12, 12]
    for ranks, micro in ((1, 4), (2, 1), (2, 2), (4, 1)):
        found = [list(indices(100, 30, micro, sizes, rank, ranks)) for rank in range(ranks)]
        order = [index for parts in zip(*found, strict=True) for part in parts for index in part]
        assert order == list(range(30, 70))
    assert list(indices(41, 30, 4, sizes, 0, 1)) == [[30, 31, 32, 33], [34, 35, 36, 37]], "eight do not fit"


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 2)])
def test_a_schedules_batches_are_megatron_cores(micro: int, ranks: int) -> None:
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    config = RunConfig()
    config.data.sequence_length = 50
    config.training.batch_schedule = [BatchStage(2000, 4), BatchStage(5000, 8), BatchStage(15_000, 20)]
    config.training.global_batch_size = 32
    theirs = StepBatchsizeNumMicroBatchesCalculator(micro, ranks, False, 1, "0:4 2K:8 5K:20 15K:32", 50)
    consumed = 0
    for size in islice(BatchSchedule(config).batches(), 60):
        theirs.update(consumed, consistency_check=True)
        assert size == theirs.get_current_global_batch_size() == theirs.get() * micro * ranks
        consumed += size
    assert consumed > 600


def test_resuming_is_exact_in_any_layout() -> None:
    whole = [numbers(100, 0, 2, 8, rank, 2) for rank in range(2)]
    assert [numbers(100, 40, 2, 8, rank, 2) for rank in range(2)] == [found[10:] for found in whole]
    other = numbers(100, 40, 4, 8)
    assert sorted(sum(other, [])) == list(range(40, 96))


def test_the_end() -> None:
    assert sum(numbers(30, 0, 4, 8), []) == list(range(24))
    assert numbers(30, 24, 4, 8) == []
    assert numbers(30, 1000, 4, 8) == []


def test_starting_over() -> None:
    assert list(islice(indices(10, 16, 2, 4, 1, 2, wrap_to=0), 4)) == [[8, 9], [2, 3], [6, 7], [0, 1]]
    assert list(islice(indices(10, 8, 1, 2, wrap_to=7), 8)) == [[8], [9], [7], [8], [9], [7], [8], [9]]


def test_batches_are_stacked() -> None:
    (batch, *_) = batches(Numbers(8), indices(8, 0, 4, 4), prefetch=1)
    assert batch["tokens"].shape == (4, 2) and batch["tokens"].dtype == torch.int64
    assert batch["loss_mask"].dtype == torch.float32
    assert set(collate([{"a": torch.tensor(True)}])) == {"a"}


def test_no_random_numbers_and_nothing_read_further_ahead() -> None:
    dataset = Numbers(100)
    state = torch.get_rng_state()
    with closing(batches(dataset, indices(100, 0, 2, 4), prefetch=1)) as iterator:
        next(iterator)
    assert dataset.asked[:2] == [0, 1] and len(dataset.asked) <= 4
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_is_the_same_however_many_are_prefetched() -> None:
    expected = list(indices(100, 8, 2, 8, 1, 2))
    assert numbers(100, 8, 2, 8, 1, 2, prefetch=3) == numbers(100, 8, 2, 8, 1, 2) == expected


def test_prefetching_passes_errors_on_and_ends() -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index == 3:
                raise OSError("vanished")
            return super().__getitem__(index)

    iterator = batches(Broken(100), indices(100, 0, 1, 1), prefetch=2)
    assert [int(next(iterator)["tokens"][0, 0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="vanished"):
        next(iterator)
    before = threading.active_count()
    iterator = batches(Numbers(1000), indices(1000, 0, 1, 1), prefetch=2)
    next(iterator)
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    iterator.close()  # type: ignore[attr-defined]
    thread.join(10)
    assert threading.active_count() == before
