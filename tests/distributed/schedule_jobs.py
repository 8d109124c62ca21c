"""Whole runs that say which samples each of their steps had."""

from __future__ import annotations

from dataclasses import dataclass, field
from unittest import mock

import torch

from plt_megatron.config.schema import RunConfig
from tests.distributed.training_jobs import train


@dataclass
class Trained:
    """The end of a job, as `train` returns it, and the samples of each step in their order, all ranks' together."""

    result: bool | str
    steps: list[list[int]] = field(default_factory=list)


def train_and_tell(config: RunConfig, bad_step: int = 0) -> Trained:
    """Run a trainer to its end. The `bad_step`-th step run has a loss that is no number."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from plt_megatron.train.trainer import Trainer

    told: list[list[int]] = []
    next_step = Trainer._next_step

    def tell(trainer: Trainer) -> object:
        step = next_step(trainer)
        own = [batch.sample_ids.tolist() for batch in step.batches]
        ranks: list[list[list[int]]] = [own] * parallel_state.get_data_parallel_world_size()
        dist.all_gather_object(ranks, own, group=parallel_state.get_data_parallel_group())
        # The j-th microbatches of all ranks come one after another.
        told.append([sample for parts in zip(*ranks, strict=True) for part in parts for sample in part])
        return step

    with mock.patch.object(Trainer, "_next_step", tell):
        return Trained(train(config, bad_step), told)


def loss_of_rows(config: RunConfig, length: int) -> float:
    """Loss per token of a run's first global batch at its initial weights, each row of `length` tokens by itself."""
    from megatron.core import parallel_state

    from plt_megatron.model.looped_gpt import MicroBatch
    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.trainer import Trainer

    init_process_groups(config.parallel)
    trainer = Trainer(config)
    try:
        total, count = 0.0, 0
        for index in range(config.training.global_batch_size):
            sample, edges = trainer.data.train[index], set()
            at = 0
            for part in trainer.data.train.parts(index)[1]:
                edges.add(at)
                at += part.length
            for first in range(0, config.data.sequence_length, length):
                row = slice(first, first + length)
                starts = torch.tensor([[at == first or at in edges for at in range(first, first + length)]])
                own = {name: sample[name][row][None] for name in ("tokens", "labels", "loss_mask")}
                packed = starts if config.data.reset_at_document_boundaries else None
                loss, tokens = trainer.engine.evaluate([MicroBatch(**own, document_starts=packed)], 2)
                total, count = total + loss, count + tokens
        return total / count
    finally:
        trainer.close()
        parallel_state.destroy_model_parallel()
