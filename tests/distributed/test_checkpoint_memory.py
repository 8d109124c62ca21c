"""Saving holds and loading reads a rank's share, not the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader

from plt_megatron.config.schema import RunConfig
from plt_megatron.predict.layout import estimate_layout
from plt_megatron.predict.memory import saving_bytes
from plt_megatron.predict.step import Step
from plt_megatron.train.checkpoint.loading import load_checkpoint
from plt_megatron.train.checkpoint.saving import begin_save
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.memory_jobs import StorageCounter

LARGER = {"hidden_size": 128, "ffn_hidden_size": 352}  # 0.76M parameters: small things weigh little


@dataclasses.dataclass
class SaveAndLoad:
    """Bytes on one rank.

    Attributes:
        parameters: of the stage, counted, not bytes.
        saving: the most that saving held at once beside what training holds; planned, and written.
        written: by this rank.
        loading: the most that loading held beside what training holds.
        read: of the checkpoint's files by this rank, whole stored tensors, of which it may need a part; no checksums.
    """

    parameters: int
    saving: int
    written: int
    loading: int
    read: int


def save_and_load(directory: Path, config: RunConfig, staged: bool = False) -> SaveAndLoad:
    """Train a step, save, and load what was saved into the same engine."""
    with StorageCounter() as counter:
        engine = jobs.build(config)
        jobs.train(engine, 1, 1)
        before = counter.peak = counter.held
        save = begin_save(engine, directory, {"step": 1}, staged=staged)
        written = sum(tensor.nbytes for *_, (_, tensors) in save.buckets for _, tensor in tensors)
        save.write()
        path = save.publish(2, 0)
        saving = counter.peak - before
        del save
        before = counter.peak = counter.held
        read: list[int] = []
        stock = FileSystemReader._slice_file

        def counting(reader: Any, file: Any, info: Any) -> Any:
            read.append(info.length)
            return stock(reader, file, info)

        with mock.patch.object(FileSystemReader, "_slice_file", counting):
            load_checkpoint(engine, path)
        loading = counter.peak - before
    parameters = sum(parameter.numel() for parameter in engine.stage.parameters())
    return SaveAndLoad(parameters, saving, written, loading, sum(read))


@pytest.mark.parametrize("ranks", [2, 4])
def test_saving_holds_and_loading_reads_a_rank_s_share(run_distributed, tmp_path, ranks):
    """bf16: 14 bytes of a parameter are saved, its main weights and moments by the rank that has them."""
    config = jobs.run_config({"data_parallel_size": ranks}, "bf16", **LARGER)
    estimated = saving_bytes(Step.of(config, estimate_layout(config, on_cpu=True), jobs.VOCAB))
    seen = run_distributed(save_and_load, ranks, tmp_path, config, True, all_ranks=True)
    for rank in seen:
        assert rank.parameters * 14 / ranks == pytest.approx(estimated, rel=0.01)
        assert rank.written == pytest.approx(estimated, rel=0.03)
        assert rank.saving == pytest.approx(estimated, rel=0.03), "what is written is copied, and nothing else is held"
        assert rank.loading < 2.5 * rank.parameters, "the optimizer's state is read into place"
        assert rank.read < 1.1 * estimated, "read once by one rank"
