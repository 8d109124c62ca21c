"""megatron-core's builder of datasets, as `datasets` uses it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from plt_megatron.data.tokenizer import Tokenizer


class MegatronTokenizer:
    """What megatron-core's datasets use of a tokenizer. No padding token: samples are never padded."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.eod = tokenizer.eod if tokenizer else None
        self.vocab_size = tokenizer.vocab_size if tokenizer else None
        self.unique_identifiers = tokenizer.unique_identifiers if tokenizer else OrderedDict(none=None)


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
