"""megatron-core's dataset builder, adapted for `datasets`, and samples drawn stage by stage (`data.stages`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import normalize
from torch.utils.data import Dataset

from plt_megatron.config.derived import SOURCE_PARTS
from plt_megatron.config.schedules import distinct_sources, stage_samples, stage_sources
from plt_megatron.config.schema import DataConfig
from plt_megatron.data.indexed import files_of, map_files
from plt_megatron.data.tokenizer import Tokenizer


class MegatronTokenizer:
    """The tokenizer interface of megatron-core's datasets. It has no padding token: samples are never padded."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.eod = tokenizer.eod if tokenizer else None
        self.vocab_size = tokenizer.vocab_size if tokenizer else None
        # megatron-core hashes these into the names of its cached indices.
        self.unique_identifiers: dict[str, Any] = {"none": None}
        if tokenizer is not None:
            kind = type(tokenizer).__name__
            self.unique_identifiers = {"class": kind, "sha256": tokenizer.fingerprint, "eod": tokenizer.eod}


class JoinedDataset(IndexedDataset):
    """megatron-core's `IndexedDataset` for a source in parts: one index, and tokens in several files."""

    @classmethod
    def of(cls, prefix: str) -> JoinedDataset | None:
        """Open the source at `prefix`; None if it is not a source in parts."""
        # The last two arguments keep megatron-core from opening a .bin or requiring one.
        is_joined = Path(prefix + SOURCE_PARTS).is_file()
        return cls(prefix, multimodal=False, mmap=False, fast_cache_load=True) if is_joined else None

    def initialize(self, path_prefix: str, *args: Any, **kwargs: Any) -> None:
        """Open the index and the parts' tokens. `IndexedDataset` calls this when constructed or unpickled."""
        super().initialize(path_prefix, *args, **kwargs)
        self.bin_reader = _JoinedReader(files_of(path_prefix, ".bin"))


class _JoinedReader:
    """Reader of `.bin` files laid end to end. Each document lies within one file."""

    def __init__(self, files: list[str]) -> None:
        self._bytes = map_files(files, np.uint8)

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        return np.frombuffer(self._bytes[int(offset) : end], dtype)


class Builder(BlendedMegatronDatasetBuilder):
    """megatron-core's builder without its barriers: `build_datasets` synchronizes the ranks, with a timeout, and passes
    errors on."""

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any], is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        return cls(*args)

    def build_each(self, prefixes: list[str], split: list[Any], sizes: list[list[int]]) -> list[list[Any]]:
        """Build the unblended datasets of several sources; return them by part, then by source. megatron-core uses it.

        Args:
            split: where each part begins and ends in each source; None: do not build it.
            sizes: samples to draw, by source and part.
        """

        def build(prefix: str, own: list[int]) -> list[Any]:
            return self._build_megatron_dataset_splits(prefix, split, own, synchronize_ranks=False)

        with ThreadPoolExecutor(self.config.num_dataset_builder_threads) as pool:
            per_source = list(pool.map(build, prefixes, sizes))
        return [list(part) for part in zip(*per_source, strict=True)]

    _build_megatron_datasets_parallel = build_each


class StagedDataset(Dataset):
    """Samples in the order of the run. `datasets`: by source number; those of unused sources may be missing.

    `sources` and `samples`: see `draw_stages`.
    """

    def __init__(self, datasets: Mapping[int, GPTDataset], sources: np.ndarray, samples: np.ndarray) -> None:
        self.datasets, self.dataset_index, self.dataset_sample_index = datasets, sources, samples

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.datasets[int(self.dataset_index[index])][int(self.dataset_sample_index[index])]


def draw_stages(data: DataConfig, samples: int, cache: Path) -> list[np.ndarray]:
    """Draw the samples of all stages, `samples` in total; read them from the folder `cache`, or write them to it.

    Returns three arrays: each sample's source, int16 [samples], an index into `distinct_sources`; its number within
    that source, int64 [samples], 0, 1, 2 ... through all stages; and the samples of each source, int64 [sources].
    """
    files = [cache / f"stages_{name}.npy" for name in ("sources", "samples", "counts")]
    if not all(file.is_file() for file in files):
        for file, array in zip(files, _draw(data, samples), strict=True):
            np.save(file, array)
    return [np.load(file, mmap_mode="r") for file in files]


def _draw(data: DataConfig, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw each stage by megatron-core's blending; a source continues with the sample after its last one."""
    paths = [os.path.abspath(source.path) for source in distinct_sources(data)]
    index, inner = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    counts = np.zeros(len(paths), np.int64)
    for sources, among in zip(stage_sources(data), stage_samples(data, samples), strict=True):
        if not among:
            continue
        own = slice(among.start, among.stop)
        weights = normalize([float(source.weight) for source in sources])
        helpers.build_blending_indices(index[own], inner[own], weights, len(sources), len(among), False)
        numbers = np.array([paths.index(os.path.abspath(source.path)) for source in sources], np.int16)
        index[own] = numbers[index[own]]
        for number in numbers:
            mask = index[own] == number
            np.add(inner[own], counts[number], out=inner[own], where=mask)
            counts[number] += np.count_nonzero(mask)
    return index, inner, counts
