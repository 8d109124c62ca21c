"""Training samples from tokenized sources, on top of megatron-core's blended datasets.

The sample index of a run (which tokens form which sample) is built once, by rank 0, in a folder named by a hash of
everything it depends on, including the data's content, and published by renaming: it is never partial or stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from plt_megatron.config import derived
from plt_megatron.config.schedules import distinct_sources
from plt_megatron.config.schema import DataConfig, RunConfig
from plt_megatron.data.fill_in_middle import FillInMiddle, RearrangedDocuments, check_ends, settings_of
from plt_megatron.data.indexed import check_mask, has_mask, mask_path, open_index, open_mask, read_index, read_manifest
from plt_megatron.data.megatron_builder import Builder, JoinedDataset, MegatronTokenizer, StagedDataset, draw_stages
from plt_megatron.data.mix import (
    PARTS,
    SourceShare,
    check_ids,
    check_tokenizer,
    content_hashes,
    fingerprint,
    index_folder,
    mix_shares,
    part_sources,
    sample_sources,
    source_paths,
    split_matrix,
)
from plt_megatron.data.tokenizer import Tokenizer
from plt_megatron.errors import AttemptFailed, UserError, describe_os_error, file_error, first_line
from plt_megatron.installation import megatron_core_version
from plt_megatron.run_folder.files import publish
from plt_megatron.runtime.local_processes import usable_cores

logger = logging.getLogger(__name__)

_ABANDONED_SECONDS = 24 * 3600
INDEX_TIMEOUT_MINUTES = 60.0  # ranks wait for rank 0 to build the sample index


@dataclass
class _DatasetConfig(GPTDatasetConfig):
    reset_at_document_boundaries: bool = False
    masked_token: int | None = None  # no loss on the token that follows it
    vocab_size: int | None = None  # the model's, if known
    fill_in_middle: FillInMiddle | None = None  # applied to the training part only


@dataclass(frozen=True)
class Part:
    """The piece of a document that is in a sample: `length` of its `total` tokens, from token `first` on.

    `place` is the document's position in the run's order of documents. `fill_in_middle` is PSM or SPM for a rearranged
    document, whose `total` includes the added tokens; None: the document is as in the file.
    """

    document: int
    first: int
    length: int
    total: int
    place: int
    fill_in_middle: str | None


class _DocumentDataset(GPTDataset):
    """A GPTDataset with document boundaries in its samples, fill-in-the-middle and per-token loss masks."""

    def __init__(
        self, indexed_dataset: Any, dataset_path: str, indices: np.ndarray, num_samples: int, split: Split, config: Any
    ) -> None:
        settings = config.fill_in_middle
        rate = settings.rates.get(dataset_path, 0.0) if settings and split is Split.train else 0.0
        self._rearranged = RearrangedDocuments(indexed_dataset, rate, settings) if rate else None
        self._mask: Any = open_mask(dataset_path, open_index(dataset_path).tokens) if has_mask(dataset_path) else None
        assert self._mask is None or self._rearranged is None, "_build_index refuses it"
        super().__init__(self._rearranged or indexed_dataset, dataset_path, indices, num_samples, split, config)
        self.indices = indices[:0].copy()  # 4 bytes a document, read only while the index is built

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> IndexedDataset:
        """Open the source at `dataset_path`, which may be in parts; overrides `GPTDataset`'s."""
        return JoinedDataset.of(dataset_path) or GPTDataset.build_low_level_dataset(dataset_path, config)

    def __len__(self) -> int:
        """Return the number of samples and, in a blend, of those that megatron-core draws past what is asked for. It
        refuses to draw more than there are, but nothing reads these."""
        blend = self.config.blend or self.config.blend_per_split[self.index_split.value]
        return super().__len__() + (len(blend[0]) - 1 if blend else 0)

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        text, lengths = self._text(int(idx or 0))
        settings = self.config
        if settings.vocab_size is not None:
            check_ids(self.dataset_path, text, settings.vocab_size)  # `check_tokenizer` reads parts of a large file
        return make_sample(
            text,
            lengths,
            reset=settings.reset_at_document_boundaries,
            masked_token=settings.masked_token,
            counted=None if self._mask is None else self._counted(self._mask, int(idx or 0)),
        )

    def _counted(self, mask: np.ndarray, idx: int) -> np.ndarray:
        """Return the source's loss mask at the tokens that `_text` returns."""
        index, item = self.dataset.index, self.dataset.index.dtype_size
        starts = [(int(index.sequence_pointers[part.document]) // item + part.first, part) for part in self.parts(idx)]
        return np.concatenate([mask[start : start + part.length] for start, part in starts])

    def _text(self, idx: int) -> tuple[np.ndarray, list[int]]:
        """Return a sample's tokens plus the one after the last, and how many come from each document."""
        if self._rearranged is None:
            text, _, lengths = self._query_document_sample_shuffle_indices(idx)
            return text, lengths
        parts = self.parts(idx)
        read = [self._rearranged.read(part.document, part.place, part.first, part.length) for part in parts]
        return np.concatenate(read), [part.length for part in parts]

    def parts(self, idx: int) -> list[Part]:
        """Return the document parts that make up a sample, including the token after its last."""
        row = int(self.shuffle_index[idx])
        (begin, first), (end, last) = (tuple(map(int, self.sample_index[row + more])) for more in (0, 1))
        found = []
        for place in range(begin, end + 1):
            document = int(self.document_index[place])
            if self._rearranged is None:
                total, order = int(self.dataset.sequence_lengths[document]), None
            else:
                total, order = self._rearranged.length(document), self._rearranged.order(document, place)
            start, stop = first if place == begin else 0, last + 1 if place == end else total
            found.append(Part(document, start, stop - start, total, place, order))
        return found


def make_sample(
    text: np.ndarray,
    document_lengths: Sequence[int],
    *,
    reset: bool,
    masked_token: int | None = None,
    counted: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Build a sample from `text`, int64 [s + 1]: consecutive documents, or parts of them, of the given lengths.

    Returns `tokens` and `labels` (int64 [s]; a label is the next token), `loss_mask` (float32 [s]) and
    `position_ids` (int64 [s]). With `reset`, also returns `document_starts` (bool [s]), True where a document part
    begins, including the sample's first token. Positions restart there, and the loss mask is 0 where the label belongs
    to the next document, as after each end-of-document token: nothing predicts the start of an unrelated document.
    `masked_token` also zeroes the loss mask at each such token, like megatron-core's `eod_mask_loss`; `counted`,
    uint8 [s + 1], zeroes it where the label is a token that does not count (see `indexed`). With both, `masked_token`
    zeroes it where the label begins a document: in conversations that token may end each message.
    """
    tokens = torch.from_numpy(text[:-1].astype(np.int64))
    labels = torch.from_numpy(text[1:].astype(np.int64))
    size = len(text) - 1
    loss_mask = torch.ones(size, dtype=torch.float32)
    begins = np.cumsum([0, *document_lengths])
    assert begins[-1] == size + 1, "the document parts must add up to the sample"
    starts = torch.zeros(size + 1, dtype=torch.bool)
    starts[begins[:-1]] = True
    if masked_token is not None:
        loss_mask[tokens == masked_token if counted is None else starts[1:]] = 0.0
    if counted is not None:
        loss_mask *= torch.from_numpy(counted[1:].astype(np.float32))
    positions = torch.arange(size)
    sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions}
    if not reset:
        return sample
    loss_mask[starts[1:]] = 0.0
    starts = starts[:-1].clone()
    last_start = torch.cummax(torch.where(starts, positions, 0), dim=0).values
    return {**sample, "position_ids": positions - last_start, "document_starts": starts}


class Samples(Dataset):
    """One part of the data: `len` samples in a fixed, shuffled order. Items are as returned by `make_sample`."""

    def __init__(self, dataset: GPTDataset | BlendedDataset | StagedDataset, names: Sequence[str], size: int) -> None:
        assert len(dataset) >= size, "megatron-core builds at least the samples asked for"
        self._dataset = dataset
        self._names = list(names)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._size:
            raise IndexError(f"sample {index} of {self._size}")
        sample = dict(self._dataset[index])
        sample.pop("dataset_id", None)
        return sample

    def documents(self, index: int) -> tuple[str, list[int]]:
        """Return the name of a sample's source and the indices in it of the documents the sample is cut from."""
        which, parts = self.parts(index)
        return self._names[which], [part.document for part in parts]

    def parts(self, index: int) -> tuple[int, list[Part]]:
        """Return the number of a sample's source, and the document parts that make up the sample, including the token
        after its last."""
        if isinstance(self._dataset, BlendedDataset | StagedDataset):
            which = int(self._dataset.dataset_index[index])
            inner = int(self._dataset.dataset_sample_index[index])
            return which, self._dataset.datasets[which].parts(inner)
        return 0, self._dataset.parts(index)


@dataclass(frozen=True)
class Datasets:
    """The samples of a run; a part without requested samples is None.

    `fingerprint` identifies the data and the order of the training samples (`mix.fingerprint`); `shares` are the
    sources' contributions.
    """

    train: Samples | None
    validation: Samples | None
    test: Samples | None
    fingerprint: dict[str, Any]
    shares: list[SourceShare]


def build_datasets(config: RunConfig, num_samples: tuple[int, int, int], tokenizer: Tokenizer | None) -> Datasets:
    """Build the samples of a run: `num_samples` of train, validation and test; None for a part of 0 samples.

    Must be called by all ranks if torch.distributed is initialized. Rank 0 builds the index in `index_folder` if it is
    missing; the others wait for up to `INDEX_TIMEOUT_MINUTES`. Raises `UserError`, on all ranks, if the data is
    missing or damaged, was made with another tokenizer, or cannot provide the samples.
    """
    built: Any = None
    failure: Exception | None = None
    told: UserError | None = None  # what the other ranks raise
    is_alone = not dist.is_initialized() or dist.get_world_size() == 1
    if is_alone or dist.get_rank() == 0:
        try:
            built = _build_index(config, num_samples, tokenizer)
        except OSError as error:
            failure = file_error(_index_failure(config, error), error)
        except Exception as error:  # of any kind: the other ranks must not be left waiting
            failure = error
        if failure is not None:
            is_known = isinstance(failure, UserError)
            why = str(failure) if is_known else f"rank 0 could not build the sample index: {failure!r}"
            told = (AttemptFailed if isinstance(failure, AttemptFailed) else UserError)(why)
    if not is_alone:
        built, told = _from_rank_0((built, told))
    if (problem := failure or told) is not None:
        raise problem
    index, key, shares = built
    if not os.path.isdir(index):
        raise UserError(
            f"the sample index {index} that rank 0 built is not visible to rank {dist.get_rank()}: set "
            "data.index_cache to a folder that all machines share"
        )
    try:
        train, validation, test = _load(config, num_samples, tokenizer, index)
    except OSError as error:
        raise file_error(f"the data cannot be read: {describe_os_error(error)}", error) from error
    return Datasets(train, validation, test, key, shares)


def _index_failure(config: RunConfig, error: OSError) -> str:
    folder = Path(index_folder(config)).absolute()
    where, why = Path(error.filename or folder), error.strerror or error
    if where.is_relative_to(folder):
        return f"the sample index cannot be written: {where}: {why}"
    return f"the sample index cannot be built: {where} cannot be read: {why}"


def _from_rank_0(outcome: Any) -> Any:
    """Return rank 0's outcome on all ranks, by the job's store: NCCL does not wait that long, and a gloo group of all
    ranks connects each with every other."""
    store = dist.distributed_c10d._get_default_store()
    key = f"sample index {store.add(f'sample indices of rank {dist.get_rank()}', 1)}"
    try:
        if dist.get_rank() == 0:
            store.set(key, pickle.dumps(outcome))  # type: ignore[arg-type]
        store.wait([key], timedelta(minutes=INDEX_TIMEOUT_MINUTES))
        return pickle.loads(store.get(key))
    except RuntimeError as error:
        raise UserError(
            f"rank {dist.get_rank()} waited {INDEX_TIMEOUT_MINUTES:g} minutes for rank 0 to build the sample index: "
            f"build it ahead of time with plt preprocess --build-index ({first_line(error)})"
        ) from error


def _build_index(
    config: RunConfig, num_samples: tuple[int, int, int], tokenizer: Tokenizer | None
) -> tuple[str, dict[str, Any], list[SourceShare]]:
    """Check the data and build the index if it is missing; return its folder and the rest of `Datasets`."""
    data, seed = config.data, config.training.seed
    shares = mix_shares(data, num_samples)
    check_tokenizer(data, tokenizer, config.model.vocab_size)
    for path in source_paths(data):
        check_mask(path, read_index(path).tokens, read_manifest(path), values=True)
    settings = settings_of(data, tokenizer, seed)
    for share in shares:
        rearranged = settings is not None and share.part == "train" and settings.rates[os.path.abspath(share.path)] > 0
        masked = has_mask(share.path)
        setting = "data.fim.rate" if rearranged else "data.eod_mask_loss" if data.eod_mask_loss and not masked else None
        if rearranged and masked:
            raise UserError(
                f"data.fim.rate: {mask_path(share.path)} does not fit rearranged documents: set the source's fim_rate "
                "to 0"
            )
        if setting is not None and tokenizer is not None:
            check_ends(setting, share.path, share.first, share.last, tokenizer.eod)
    hashes = content_hashes(data)
    content = {os.path.abspath(path): digest for path, digest in hashes.items()}
    key: list[Any] = [fingerprint(data, tokenizer, hashes, seed=seed, num_samples=list(num_samples)), content]
    # megatron-core's names of the files depend on these too; without them other ranks would look for other files.
    key += [tokenizer.eod if tokenizer else None, megatron_core_version()]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    target = Path(index_folder(config)).absolute() / digest[:24]
    if not target.is_dir():
        _build_in(target, config, num_samples, tokenizer)
    train = fingerprint(data, tokenizer, hashes, seed=seed, num_samples=num_samples[0])
    return str(target), train, shares


def _build_in(target: Path, config: RunConfig, num_samples: tuple[int, int, int], tokenizer: Tokenizer | None) -> None:
    """Build the index under a temporary name and rename it once it is complete."""
    started = time.monotonic()
    logger.info("building the sample index in %s", target)
    _remove_abandoned(target)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")  # two nodes may have equal process ids
    temporary.mkdir(parents=True)
    try:
        _load(config, num_samples, tokenizer, str(temporary))
        try:
            publish(temporary, target)
        except OSError:
            if not target.is_dir():  # else another run has just built the same index
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("built the sample index in %.1f s", time.monotonic() - started)


def _remove_abandoned(target: Path) -> None:
    """Remove what builds of this index have left that were killed: what nothing has been written to for a day."""
    for folder in target.parent.glob(f"{target.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - newest > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _load(
    config: RunConfig, num_samples: tuple[int, int, int], tokenizer: Tokenizer | None, cache: str
) -> list[Samples | None]:
    """Open the samples of each part; builds what the index in the folder `cache` lacks."""
    data, seed = config.data, config.training.seed
    settings = _DatasetConfig(
        random_seed=seed,
        sequence_length=data.sequence_length,
        path_to_cache=cache,
        tokenizer=MegatronTokenizer(tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        reset_at_document_boundaries=data.reset_at_document_boundaries,
        masked_token=tokenizer.eod if data.eod_mask_loss and tokenizer else None,
        vocab_size=config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None),
        fill_in_middle=settings_of(data, tokenizer, seed),
        num_dataset_builder_threads=min(8, usable_cores()),
        **_blend(data, num_samples),
    )
    if data.sources:  # megatron-core's own split, restricted to the parts that are used
        bounds = split_matrix(data)
        settings.split_matrix = [bounds[i] if num_samples[i] else None for i in range(len(PARTS))]
    builder = Builder(_DocumentDataset, list(num_samples), lambda: True, settings)
    staged = _take_staged(builder, data, num_samples[0], cache) if data.stages and num_samples[0] else None
    built = builder.build()
    names = [[derived.source_name(source) for source in part] for part in sample_sources(data)]
    return [
        None if dataset is None or not size else Samples(dataset, name, size)
        for dataset, name, size in zip([staged or built[0], *built[1:]], names, num_samples, strict=True)
    ]


def _take_staged(builder: Builder, data: DataConfig, samples: int, cache: str) -> StagedDataset:
    """Build the training part in stages, and remove it from what `builder` is to build."""
    bounds, config = split_matrix(data)[0], builder.config
    for parts in filter(None, (config.split_matrix, config.blend_per_split)):
        parts[0] = None
    *drawn, counts = draw_stages(data, samples, Path(cache))
    paths = [os.path.abspath(source.path) for source in distinct_sources(data)]
    used = np.flatnonzero(counts).tolist()
    sizes = [[int(counts[number]), 0, 0] for number in used]
    built = builder.build_each([paths[number] for number in used], [bounds, None, None], sizes)[0]
    return StagedDataset(dict(zip(used, built, strict=True)), *drawn)


def _blend(data: DataConfig, num_samples: Sequence[int]) -> dict[str, Any]:
    """Return the mix as megatron-core's blend settings."""

    def blend(sources: Sequence[Any]) -> tuple[list[str], list[float] | None]:
        weights = [float(source.weight) for source in sources]
        return [os.path.abspath(source.path) for source in sources], weights if len(weights) > 1 else None

    if data.sources:
        # `_load` replaces the split: it must only be three numbers for megatron-core, which reads none like 1e-3.
        return {"blend": blend(data.sources), "split": re.sub("[-+_eE]", "", data.split)}
    parts = zip(part_sources(data), num_samples, strict=True)
    return {"blend_per_split": [blend(sources) if sources and size else None for sources, size in parts]}
