"""Training samples with `data.stages`: one stage after the other, each with its own mix."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import normalize
from torch.utils.data import Dataset

from plt_megatron.config.data_stages import distinct_sources, stage_samples, stage_sources
from plt_megatron.config.schema import DataConfig


@dataclass(frozen=True)
class DrawnStages:
    """The source, and the sample of that source, behind each sample of a run.

    Attributes:
        sources: int16 [samples], indices into `distinct_sources`.
        samples: int64 [samples], sample numbers within the source; each source's are 0, 1, 2 ... through all stages.
        counts: int64 [sources], number of samples drawn from each source.
    """

    sources: np.ndarray
    samples: np.ndarray
    counts: np.ndarray


class StagedDataset(Dataset):
    """Samples in the order of the run. `datasets`: by source number; those of unused sources may be missing."""

    def __init__(self, datasets: Mapping[int, GPTDataset], drawn: DrawnStages) -> None:
        self.datasets = datasets
        self.dataset_index, self.dataset_sample_index = drawn.sources, drawn.samples

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.datasets[int(self.dataset_index[index])][int(self.dataset_sample_index[index])]


def draw_stages(data: DataConfig, samples: int, cache: Path) -> DrawnStages:
    """Draw the samples of all stages, `samples` in total; read them from the folder `cache`, or write them to it."""
    files = [cache / f"stages_{name}.npy" for name in ("sources", "samples", "counts")]
    if not all(file.is_file() for file in files):
        for file, array in zip(files, _draw(data, samples), strict=True):
            np.save(file, array)
    return DrawnStages(*(np.load(file, mmap_mode="r") for file in files))


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
