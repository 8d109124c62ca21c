"""Four steps of any configuration in its layout, and every number that must not depend on it. Run by the pool.

As tests/distributed/parity.py, with the batches, row lengths and loops that the configuration's schedules say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schedules import BatchSchedule, LengthSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.model import build
from plt_megatron.model.build import global_tensors
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch
from plt_megatron.runtime.process_groups import init_process_groups
from plt_megatron.train.megatron_engine import MegatronEngine
from tests.distributed import parity
from tests.distributed.cases import VOCAB_SIZE, Outcome
from tests.reference.megatron_weights import draw_by_name

STEPS = 4
_LAST_PLACE = {"fp32": 1e-7, "bf16": 4e-3}  # about a unit of it, relatively


def train(config: RunConfig, rounded: int = 0) -> Outcome:
    """The outcome, complete on rank 0. `rounded`: not 0: of initial weights that are rounded a little otherwise,
    in one of many ways, which shows what rounding alone can do."""
    init_process_groups(config.parallel)
    vocab_size = config.model.vocab_size or VOCAB_SIZE
    with parity._randomized(False), _rounded(rounded, config.training.precision), parity._small_buckets():
        engine = MegatronEngine(config, vocab_size)
    outcome = Outcome(initial=parity._gather(engine.stage, vocab_size))
    whole = parity.draw_batches(config, 100, config.training.global_batch_size, config.data.sequence_length, vocab_size)
    outcome.numbers = parity.train_steps(engine, _steps(config, vocab_size), whole, config.model.loop_count)
    engine.gather_parameters()
    outcome.final = parity._gather(engine.stage, vocab_size)
    return outcome


def _steps(config: RunConfig, vocab_size: int) -> Iterator[tuple[list[MicroBatch], int | None]]:
    """The microbatches and loops of each step."""
    loops, batches, lengths, tokens = LoopSchedule(config), BatchSchedule(config), LengthSchedule(config), 0
    for step in range(STEPS):
        shape = batches.global_batch_size(tokens), lengths.sequence_length(tokens)
        yield parity.draw_batches(config, step, *shape, vocab_size), loops.loop_count(step, tokens)
        tokens += batches.step_tokens(tokens)


def _rounded(way: int, precision: str) -> AbstractContextManager[Any]:
    """Have the engine start from weights that are off by about one unit of the last place."""
    own = build.initialize

    def initialize(stage: LoopedGPT, seed: int) -> None:
        own(stage, seed)
        for name, tensor in global_tensors(stage):
            generator = draw_by_name(f"{name} {way}" if way > 1 else name)
            tensor.mul_(1 + _LAST_PLACE[precision] * torch.randn(tensor.shape, generator=generator))

    return mock.patch.object(build, "initialize", torch.no_grad()(initialize) if way else own)
