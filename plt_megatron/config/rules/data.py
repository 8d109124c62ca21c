"""Rules between the data settings; part of `validation`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from plt_megatron.config import derived, schedules
from plt_megatron.config.schema import DataConfig, RunConfig


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield the conflicts between data settings, one line each."""
    data = config.data
    if data.eod_mask_loss and data.tokenizer is None:
        yield "data.eod_mask_loss needs data.tokenizer, which defines the end-of-document token"
    for part in ("validation_sources", "test_sources"):
        for index, source in enumerate(getattr(data, part)):
            if source.fim_rate is not None:
                yield f"data.{part}[{index}].fim_rate: only training documents are rearranged; leave it out"
            if source.max_epochs is not None:
                yield f"data.{part}[{index}].max_epochs: only training sources are counted; leave it out"
    yield from _check_parts(config)
    yield from _check_fill_in_middle(data)
    yield from _check_listed_once(data)
    yield from schedules.data_stage_problems(data)


def _check_parts(config: RunConfig) -> Iterator[str]:
    """Check that there is data to train on and, if the run validates, to validate on."""
    data, shares = config.data, derived.split_shares(config.data.split)
    needs = {"train": "a run needs data to train on (plt preprocess makes a source)"}
    if config.validation.iters:
        needs["validation"] = "name some data to validate on, or set validation.iters=0"
    by_part = data.train_sources or data.validation_sources or data.test_sources
    for index, (part, need) in enumerate(needs.items()):
        key = f"{part}_sources" if by_part else "sources"
        if getattr(data, key) and (by_part or shares is None or shares[index] > 0):
            continue
        where = f"data.split {data.split} keeps nothing for this" if getattr(data, key) else f"data.{key} is empty"
        yield f"{where}: {need}"
        return


def _check_listed_once(data: DataConfig) -> Iterator[str]:
    times: Counter[tuple[str, str]] = Counter()
    for key, source in schedules.all_sources(data):
        listed = key.rpartition("[")[0], os.path.abspath(source.path)
        times[listed] += 1
        if times[listed] == 2:
            where, path = listed
            yield f"{where}: {path} is listed twice, and its samples would come twice, in one order: add up its weights"


def _check_fill_in_middle(data: DataConfig) -> Iterator[str]:
    rates = [derived.fim_rate(data, source) for source in data.sources or data.train_sources]
    if any(rates) and data.tokenizer is None:
        yield "data.fim.rate needs data.tokenizer, which has the tokens that mark prefix, middle and suffix"
    given = derived.fim(data).tokens
    if given is not None and (len(given) != 3 or len(set(given)) < 3 or not all(given)):
        yield f"data.fim.tokens {given}: give three different tokens, for prefix, middle and suffix, or null"
