"""megatron-core's builder of datasets, as `datasets` uses it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset

from plt_megatron.data.parts import files_of, map_files, part_prefixes
from plt_megatron.data.tokenizer import Tokenizer


class MegatronTokenizer:
    """What megatron-core's datasets use of a tokenizer. No padding token: samples are never padded."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.eod = tokenizer.eod if tokenizer else None
        self.vocab_size = tokenizer.vocab_size if tokenizer else None
        self.unique_identifiers = tokenizer.unique_identifiers if tokenizer else OrderedDict(none=None)


class JoinedDataset(IndexedDataset):
    """megatron-core's reader of a source in parts: one index, and the tokens of several files (`parts`)."""

    @classmethod
    def of(cls, prefix: str) -> JoinedDataset | None:
        """The source at `prefix`; None: it is no source in parts."""
        # The last two have megatron-core open no .bin, nor ask for one.
        is_joined = part_prefixes(prefix) != [prefix]
        return cls(prefix, multimodal=False, mmap=False, fast_cache_load=True) if is_joined else None

    def initialize(self, path_prefix: str, *args: Any, **kwargs: Any) -> None:
        """See `IndexedDataset`, which calls it when one is made or unpickled."""
        super().initialize(path_prefix, *args, **kwargs)
        self.bin_reader = _JoinedReader(files_of(path_prefix, ".bin"))


class _JoinedReader:
    """`count` items of files end to end, from byte `offset` on. Documents lie within a file each."""

    def __init__(self, files: list[str]) -> None:
        self._bytes = map_files(files, np.uint8)

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        return np.frombuffer(self._bytes[int(offset) : end], dtype)


class Builder(BlendedMegatronDatasetBuilder):
    """megatron-core's builder without its barriers: `build_datasets` orders the ranks, with a time-out and with
    errors passed on."""

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any], is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        return cls(*args)

    def build_each(self, prefixes: list[str], split: list[Any], sizes: list[list[int]]) -> list[list[Any]]:
        """The unmixed datasets of several sources: by part, then by source.

        Args:
            split: where each part begins and ends in each source; None: not built.
            sizes: samples to draw, by source and part.
        """
        return self._build_megatron_datasets_parallel(prefixes, split, sizes)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes_per_dataset: list[list[int]]
    ) -> list[list[Any]]:
        def build(prefix: str, sizes: list[int]) -> list[Any]:
            return self._build_megatron_dataset_splits(prefix, split, sizes, synchronize_ranks=False)

        with ThreadPoolExecutor(self.config.num_dataset_builder_threads) as pool:
            per_source = list(pool.map(build, prefixes, sizes_per_dataset))
        return [list(part) for part in zip(*per_source, strict=True)]
