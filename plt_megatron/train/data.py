"""A run's data: its tokenizer, its samples, and this rank's microbatches.

Which samples form the n-th global batch depends on nothing but the dataset and the global batch sizes. Layouts only
divide it differently, and a run is resumed by the number of samples consumed: there is no other state, and no random
number generator. The samples' order is the dataset's, which follows from the seed and the number of samples asked for:
a longer run draws in another order, which `mix.fingerprint` with `num_samples` detects.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.layout import layout_of
from plt_megatron.config.rules.uploads import is_url
from plt_megatron.config.schedules import BatchSchedule, LengthSchedule, stage_samples
from plt_megatron.config.schema import DataConfig, RunConfig
from plt_megatron.data.datasets import Samples, build_datasets
from plt_megatron.data.indexed import read_manifest
from plt_megatron.data.mix import (
    consumed_epochs,
    describe_mix,
    document_record,
    part_sources,
    required_samples,
    samples_after,
    training_samples,
    validation_alone,
)
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.model.loop_context import document_lengths
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.run_folder.checkpoints import candidates
from plt_megatron.storage.copies import read_progress as read_uploaded_progress
from plt_megatron.train.checkpoint.collective import on_rank_0

logger = logging.getLogger(__name__)


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples: each value becomes [micro batch, ...]."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def micro_batch_indices(
    length: int,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_sizes: Iterable[int],
    data_parallel_rank: int,
    data_parallel_size: int,
    wrap_to: int | None = None,
) -> Iterator[list[int]]:
    """Yield the sample numbers of this rank's microbatches, one global batch after the other.

    Microbatch j of rank r is samples [(j * ranks + r) * micro batch size, ...) of the global batch. Begins after
    `consumed_samples`, which all ranks together have trained on; ends with `global_batch_sizes`, multiples of the
    ranks' microbatches, and before the first global batch that does not fit in `length`, unless `wrap_to` names the
    sample to continue with after the last one.
    """
    per_step = micro_batch_size * data_parallel_size
    start = consumed_samples
    for size in global_batch_sizes:
        if wrap_to is None and start + size > length:
            return
        for first in range(start + data_parallel_rank * micro_batch_size, start + size, per_step):
            part, to = range(first, first + micro_batch_size), wrap_to or 0
            yield [index if index < length else to + (index - length) % (length - to) for index in part]
        start += size


def batches(dataset: Samples, indices: Iterator[list[int]], prefetch: int) -> Generator[dict[str, Tensor]]:
    """Yield microbatches, dicts of stacked tensors; `sample_ids` (int64 [micro batch]) has the sample numbers.

    A thread prepares `prefetch` of them ahead, in the order of `indices` (from `micro_batch_indices`); its exception is
    raised in place of one. Close the iterator to end the thread.
    """
    made = ({**collate([dataset[index] for index in part]), "sample_ids": torch.tensor(part)} for part in indices)
    pool = ThreadPoolExecutor(1, "batches")
    try:
        ready = deque(pool.submit(next, made, None) for _ in range(prefetch))
        while (item := ready.popleft().result()) is not None:
            ready.append(pool.submit(next, made, None))
            yield item
    finally:
        # A thread still inside torch when the interpreter exits would abort the process.
        pool.shutdown(wait=True, cancel_futures=True)


class RunData:
    """Training and validation data. Construction is collective and needs process groups.

    Attributes:
        by_source: with `validation.by_source`, validation samples by source name; empty otherwise, or without
            validation.
        fingerprint: everything that the sequence of training samples depends on.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        self.vocab_size = _vocab_size(config, self.tokenizer)
        _, validation, test = required_samples(config)
        self._samples = on_rank_0(lambda: _training_samples(config))
        built = build_datasets(config, (self._samples, validation, test), self.tokenizer)
        assert built.train is not None
        self.train, self.validation = built.train, built.validation
        self.fingerprint, self._shares = built.fingerprint, built.shares
        self.document_record = on_rank_0(lambda: document_record(config.data, self.tokenizer))
        self.by_source = self._build_by_source(validation) if config.validation.by_source and validation else {}
        self._ends = on_rank_0(lambda: _document_ends(config.data)) if self.by_source else {}
        self._bytes: dict[str, int] = {}
        self._count_bytes = _byte_counter(self.tokenizer) if self.by_source else None

    def _build_by_source(self, samples: int) -> dict[str, Samples]:
        found = {}
        self._shares = [share for share in self._shares if share.part != "validation"]  # of a mix that is not read
        for source, alone in validation_alone(self._config):
            built = build_datasets(alone, (0, samples, 0), self.tokenizer)
            assert built.validation is not None
            found[derived.source_name(source)] = built.validation
            self._shares += built.shares
        return found

    def validation_bytes(self, source: str) -> int | None:
        """Return the bytes of text to predict in a source's validation samples; None without a tokenizer, or with one
        whose tokens do not tell them. Collective: each rank reads its share."""
        if self._count_bytes is None:
            return None
        if source not in self._bytes:
            data, end = self.by_source[source], self._ends[source]
            own = range(dist.get_rank(), len(data), dist.get_world_size())
            counted = sum(self._count_bytes(data[index], end) for index in own)
            total = torch.tensor(counted, dtype=torch.int64, device=torch.cuda.current_device())
            dist.all_reduce(total)
            self._bytes[source] = int(total)
        return self._bytes[source]

    def describe(self) -> str:
        """Return a table of the sources."""
        return describe_mix(self._config.data, self._shares)

    def epochs(self, consumed_samples: int) -> dict[str, float]:
        """Return the passes over each training source so far, by source name."""
        return consumed_epochs(self._shares, consumed_samples, self._samples)

    def training_batches(self, consumed_samples: int, trained_tokens: int) -> Generator[list[MicroBatch]]:
        """Yield this rank's microbatches, one global batch after another. Their number and their row length depend on
        the tokens that the run has been trained on."""
        steps = partial(_steps, self._config, trained_tokens)
        # Samples run out only after a rollback has skipped some: continue with the last stage's.
        wrap_to = [among.start for among in stage_samples(self._config.data, len(self.train)) if among][-1]
        return self._global_batches(self.train, steps, consumed_samples, wrap_to)

    def validation_batches(self, source: str | None = None) -> Generator[list[MicroBatch]]:
        """Yield this rank's microbatches of the validation data, or of one source's, from the start."""
        samples = self.validation if source is None else self.by_source[source]
        assert samples is not None
        step = self._config.training.global_batch_size, self._config.data.sequence_length
        return self._global_batches(samples, partial(itertools.repeat, step))

    def _global_batches(
        self,
        dataset: Samples,
        steps: Callable[[], Iterator[tuple[int, int]]],
        consumed_samples: int = 0,
        wrap_to: int | None = None,
    ) -> Generator[list[MicroBatch]]:
        training = self._config.training
        layout = layout_of(self._config, dist.get_world_size())
        indices = micro_batch_indices(
            len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=training.micro_batch_size,
            global_batch_sizes=(size for size, _ in steps()),
            data_parallel_rank=layout.coordinates(dist.get_rank())["dp"],
            data_parallel_size=layout.data,
            wrap_to=wrap_to,
        )
        # All of the next step's: what is read between two steps, the GPU waits for.
        ahead = max(2, layout.num_microbatches(training.global_batch_size, training.micro_batch_size))
        with contextlib.closing(batches(dataset, indices, prefetch=ahead)) as micro_batches:
            for size, length in steps():
                count = layout.num_microbatches(size, training.micro_batch_size)
                batch = [_to_microbatch(in_rows(part, length)) for part in itertools.islice(micro_batches, count)]
                if not batch:
                    return
                yield batch


def _steps(config: RunConfig, tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (global batch size, row length) of the steps that follow after `tokens`, endlessly."""
    lengths = LengthSchedule(config)
    for size in BatchSchedule(config).batches(tokens):
        yield size, lengths.sequence_length(tokens)
        tokens += size * config.data.sequence_length


def in_rows(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Cut a collated microbatch's samples into rows of `length` tokens, each with a context of its own: tensors
    [samples, tokens] become [rows, length]. `sample_ids` stay."""
    if length == batch["tokens"].shape[1]:
        return batch
    rows = {name: value if name == "sample_ids" else value.reshape(-1, length) for name, value in batch.items()}
    # Positions restart where the row cuts a document; one that begins within the row has smaller positions already.
    rows["position_ids"] = rows["position_ids"].minimum(torch.arange(length))
    if "document_starts" in rows:
        rows["document_starts"] = rows["document_starts"].clone()
        rows["document_starts"][:, 0] = True
    return rows


def _training_samples(config: RunConfig) -> int:
    """Return `training_samples`, also as of a checkpoint that the run has yet to fetch."""
    settings = config.checkpoint
    has_own = settings.enabled and candidates(derived.run_folder(config))
    load = None if settings.weights_only or has_own else settings.load
    if config.training.train_tokens is None or load is None or not is_url(load):
        return training_samples(config)
    return samples_after(config, read_uploaded_progress(load)[1])


def _document_ends(data: DataConfig) -> dict[str, int | None]:
    """Return the token that ends each validation source's documents, by its manifest; None: the tokenizer's."""
    made = {derived.source_name(each): read_manifest(each.path).get("tokenizer", {}) for each in part_sources(data)[1]}
    return {name: tokenizer.get("eod") for name, tokenizer in made.items()}


def _byte_counter(tokenizer: Tokenizer | None) -> Callable[[dict[str, Tensor], int | None], int] | None:
    """Return a function that counts the bytes of text that a sample's labels in the loss stand for, without the space
    that a tokenizer may put before each document, given the token that ends one; None if the tokenizer does not tell
    its tokens' bytes."""
    if tokenizer is None:
        return None
    try:
        of_tokens = tokenizer.byte_lengths()
    except UserError as error:
        if dist.get_rank() == 0:
            logger.warning("losses of sources are not given in bits per byte: %s", error)
        return None
    lengths, prefix = torch.from_numpy(of_tokens), tokenizer.prefix_bytes(of_tokens)

    def count(sample: dict[str, Tensor], end: int | None) -> int:
        begins = sample["tokens"] == (tokenizer.eod if end is None else end)
        return int((lengths[sample["labels"]] - prefix * begins) @ sample["loss_mask"].long())

    return count


def _vocab_size(config: RunConfig, tokenizer: Tokenizer | None) -> int:
    given = config.model.vocab_size
    if tokenizer is None:
        assert given is not None, "validate() requires a tokenizer or model.vocab_size"
        return given
    if given is not None and given < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: {given} is smaller than the tokenizer's {tokenizer.vocab_size} ids "
            f"({config.data.tokenizer}); leave it out to use the tokenizer's"
        )
    return given or tokenizer.vocab_size


def _to_microbatch(batch: dict[str, torch.Tensor]) -> MicroBatch:
    """Move a collated microbatch of the data set to this rank's device."""
    sample_ids, starts = batch.pop("sample_ids"), batch.get("document_starts")
    device = torch.cuda.current_device()
    moved: dict[str, Any] = {
        name: tensor.pin_memory().to(device=device, non_blocking=True) for name, tensor in batch.items()
    }
    lengths = None if starts is None else document_lengths(starts)  # while `starts` is on the host
    return MicroBatch(**moved, document_lengths=lengths, sample_ids=sample_ids)
