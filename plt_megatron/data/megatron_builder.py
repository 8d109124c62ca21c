"""megatron-core's dataset builder, adapted for `datasets`."""

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
    """The tokenizer interface of megatron-core's datasets. It has no padding token: samples are never padded."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.eod = tokenizer.eod if tokenizer else None
        self.vocab_size = tokenizer.vocab_size if tokenizer else None
        self.unique_identifiers = tokenizer.unique_identifiers if tokenizer else OrderedDict(none=None)


class JoinedDataset(IndexedDataset):
    """megatron-core's `IndexedDataset` for a source in parts: one index, and tokens in several files (`parts`)."""

    @classmethod
    def of(cls, prefix: str) -> JoinedDataset | None:
        """Open the source at `prefix`; None if it is not a source in parts."""
        # The last two arguments keep megatron-core from opening a .bin or requiring one.
        is_joined = part_prefixes(prefix) != [prefix]
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
