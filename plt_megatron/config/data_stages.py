"""Training data whose mix changes at given token counts: `data.stages`.

A run reads the samples of the first stage, then those of the next: which sample is the n-th depends neither on batch
sizes nor on ranks.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator

from plt_megatron.config import schedules
from plt_megatron.config.schema import DataConfig, DataSource


def training_sources(data: DataConfig) -> list[DataSource]:
    """Return the training sources of the last stage, the only one without `data.stages`."""
    return data.sources or data.train_sources


def stage_sources(data: DataConfig) -> list[list[DataSource]]:
    """Return the training sources of each stage, the last one included."""
    return [*(stage.sources for stage in data.stages), training_sources(data)]


def stage_of_sample(data: DataConfig, sample: int) -> int:
    """Return the index of a sample's stage."""
    return bisect_right([stage.until // data.sequence_length for stage in data.stages], sample)


def stage_samples(data: DataConfig, samples: int) -> list[range]:
    """Return each stage's sample indices, out of `samples`. A sample belongs to a stage if its last token does."""
    ends = [min(samples, stage.until // data.sequence_length) for stage in data.stages]
    return [range(first, end) for first, end in zip([0, *ends], [*ends, samples], strict=True)]


def distinct_sources(data: DataConfig) -> list[DataSource]:
    """Return the training sources of all stages in order of first use, each path once."""
    found: dict[str, DataSource] = {}
    for sources in stage_sources(data):
        for source in sources:
            found.setdefault(os.path.abspath(source.path), source)
    return list(found.values())


def all_sources(data: DataConfig) -> Iterator[tuple[str, DataSource]]:
    """Yield (dotted key, source) for every source of every part."""
    lists = {f"data.{name}": getattr(data, name) for name in ("sources", "train_sources", "validation_sources")}
    lists |= {f"data.stages[{number}].sources": stage.sources for number, stage in enumerate(data.stages)}
    for key, sources in (lists | {"data.test_sources": data.test_sources}).items():
        yield from ((f"{key}[{index}]", source) for index, source in enumerate(sources))


# ---------------------------------------------------------------- checks


def find_problems(data: DataConfig) -> Iterator[str]:
    """Yield the problems of the stages, one line each, assuming that each number is in range."""
    if not data.stages:
        return
    rates = [data.fim is not None and data.fim.rate, *(source.fim_rate for _, source in all_sources(data))]
    if any(rates):
        yield "data.stages with data.fim is not verified: leave one of them out"
    length, begins = data.sequence_length, schedules.starts(data.stages)

    def too_short(number: int) -> str | None:
        holds = data.stages[number].until // length > begins[number] // length
        return None if holds else f"no sample of {length:,} tokens ends"

    yield from schedules.find_problems("data.stages", data.stages, too_short)
    keys = [*(f"data.stages[{number}].sources" for number in range(len(data.stages))), "data.sources"]
    for key, sources in zip(keys, stage_sources(data), strict=True):
        paths = [os.path.abspath(source.path) for source in sources]
        double = next((path for path in paths if paths.count(path) > 1), None)
        if double is not None:
            yield f"{key}: {double} is listed twice, which data.stages cannot tell apart: add up its weights"
