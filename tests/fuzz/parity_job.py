"""Four steps of any configuration in its layout, and every number that must not depend on it. Run by the pool.

As tests/distributed/parity.py, with the batches, row lengths and loops that the configuration's schedules say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state

from plt_megatron.config.batch_schedule import BatchSchedule
from plt_megatron.config.length_schedule import LengthSchedule
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.model import build
from plt_megatron.model.initialization import global_tensors
from plt_megatron.model.loop_context import Documents
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
    outcome, tokens = Outcome(initial=parity._gather(engine.stage, vocab_size)), 0
    loops, batches, lengths = LoopSchedule(config), BatchSchedule(config), LengthSchedule(config)
    for step in range(STEPS):
        shape = batches.global_batch_size(tokens), lengths.sequence_length(tokens)
        result = engine.train_step(
            _batches(config, step, *shape, vocab_size), loop_count=loops.loop_count(step, tokens)
        )
        tokens += batches.step_tokens(tokens)
        outcome.numbers[f"loss {step}"] = result.loss
        outcome.numbers[f"gradient norm {step}"] = result.grad_norm
        if result.head_z_loss is not None:
            outcome.numbers[f"z-loss {step}"] = result.head_z_loss
        if step == 0:
            for count in _evaluated_loops(config.model.loop_count):
                whole = config.training.global_batch_size, config.data.sequence_length
                loss, counted = engine.evaluate(_batches(config, 100, *whole, vocab_size), count)
                outcome.numbers[f"validation loss at {count}"] = loss / counted
    engine.gather_parameters()
    outcome.final = parity._gather(engine.stage, vocab_size)
    return outcome


def _evaluated_loops(loops: int) -> list[int]:
    return [1] if loops == 1 else sorted({1, loops - 1, min(loops + 1, 8)})


def _batches(config: RunConfig, seed: int, samples: int, length: int, vocab_size: int) -> list[MicroBatch]:
    """This rank's share of a global batch of `samples`, read as rows of `length`, that depends on `seed` alone; a fifth
    of the tokens does not count."""
    each = config.data.sequence_length // length
    rows, size = samples * each, config.training.micro_batch_size * each
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
    mask = (torch.rand(rows, length, generator=generator) > 0.2).float()
    starts = torch.rand(rows, length, generator=generator) < 0.3
    share = rows // parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * share
    packed = config.data.reset_at_document_boundaries
    return [
        MicroBatch(
            tokens=tokens[row : row + size, :-1].contiguous(),
            labels=tokens[row : row + size, 1:].contiguous(),
            loss_mask=mask[row : row + size],
            document_starts=starts[row : row + size] if packed else None,
            position_ids=Documents(starts[row : row + size]).position_ids if packed else None,
        )
        for row in range(first, first + share, size)
    ]


@contextmanager
def _rounded(way: int, precision: str) -> Iterator[None]:
    """Have the engine start from weights that are off by about one unit of the last place."""
    own = build.initialize

    def initialize(stage: LoopedGPT, seed: int) -> None:
        own(stage, seed)
        for name, tensor in global_tensors(stage):
            generator = draw_by_name(f"{name} {way}" if way > 1 else name)
            tensor.mul_(1 + _LAST_PLACE[precision] * torch.randn(tensor.shape, generator=generator))

    build.initialize = torch.no_grad()(initialize) if way else own
    try:
        yield
    finally:
        build.initialize = own
