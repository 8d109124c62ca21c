"""Train a tiny model for a few steps in a layout, and report every number that must not depend on it.

These functions run in the pool's workers. Gates, norms and biases of experts are randomized: as built, gates and biases
are zero and norms one, which would hide most mistakes in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from torch import Tensor

from plt_megatron.config.schema import (
    DataConfig,
    LoopStage,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from plt_megatron.model import build
from plt_megatron.model.build import global_tensors, initialize
from plt_megatron.model.loop_context import Documents
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch
from plt_megatron.runtime.process_groups import init_process_groups
from plt_megatron.train import megatron_engine
from plt_megatron.train.megatron_engine import MegatronEngine
from tests.distributed.cases import GLOBAL_BATCH_SIZE, MODEL, SEQUENCE_LENGTH, STEPS, VOCAB_SIZE, Case, Layout, Outcome
from tests.reference.megatron_weights import randomize_biases, randomize_gates_and_norms
from tests.settings import changed, make


def train_all(layout: Layout, cases: list[Case]) -> list[Outcome]:
    """See `cases.train_cases`."""
    init_process_groups(_parallel(layout, Case()))
    outcomes = []
    for case in cases:
        try:
            outcomes.append(_train(layout, case))
        except Exception as error:
            error.add_note(f"in {layout}, {case}")
            raise
    return outcomes


def _train(layout: Layout, case: Case) -> Outcome:
    outcome = Outcome()
    with _randomized(case.zero_gates), _small_buckets():
        engine = MegatronEngine(_config(layout, case), VOCAB_SIZE)
    dispatched = _observe_reduction(engine)
    outcome.initial = _gather(engine.stage)
    outcome.numbers = train_case(engine, layout, case, STEPS)
    engine.gather_parameters()
    outcome.final = _gather(engine.stage)
    outcome.dispatched = _gather_objects(dispatched)
    return outcome


def train_with_other_sums(layout: Layout, case: Case) -> Outcome:
    """As if each tensor-parallel rank's data-parallel group summed gradients in an order of its own, as NCCL may."""
    finalize = megatron_engine.finalize_model_grads

    def finalize_with_other_rounding(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        finalize(chunks, *args, **kwargs)
        for parameter in chunks[0].parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                parameter.main_grad *= 1 + 1e-6 * parallel_state.get_tensor_model_parallel_rank()

    init_process_groups(_parallel(layout, case))
    with mock.patch.object(megatron_engine, "finalize_model_grads", finalize_with_other_rounding):
        return _train(layout, case)


def train_case(engine: Any, layout: Layout, case: Case, count: int) -> dict[str, float]:
    """The numbers of `count` steps, or of as many as the case has."""
    loops = case.step_loops or (case.loops,) * count
    steps = ((_batches(step, layout, case), loops[step]) for step in range(len(loops)))
    return train_steps(engine, steps, _validation(layout, case), case.loops)


def train_steps(
    engine: Any, steps: Iterable[tuple[list[MicroBatch], int | None]], validation: list[MicroBatch], loops: int
) -> dict[str, float]:
    """Losses and gradient norms of steps, given by their microbatches and loops; and after the first step validation
    losses at one loop, and at one less and one more than `loops`."""
    numbers = {}
    for step, (batches, loop_count) in enumerate(steps):
        result = engine.train_step(batches, loop_count=loop_count)
        numbers[f"loss {step}"], numbers[f"gradient norm {step}"] = result.loss, result.grad_norm
        if result.head_z_loss is not None:
            numbers[f"z-loss {step}"] = result.head_z_loss
        for other in sorted({1, loops - 1, min(loops + 1, 8)} if loops > 1 else {1}) if step == 0 else ():
            loss, tokens = engine.evaluate(validation, other)
            numbers[f"validation loss at {other}"] = loss / tokens
    return numbers


def _parallel(layout: Layout, case: Case) -> ParallelConfig:
    return ParallelConfig(
        **layout.settings, overlap_grad_reduce=case.overlap, recompute_granularity=case.recompute, **case.parallel
    )


def _config(layout: Layout, case: Case) -> RunConfig:
    return RunConfig(
        model=make(ModelConfig, {**MODEL, "loop_count": case.loops, **case.model}),
        parallel=_parallel(layout, case),
        data=DataConfig(sequence_length=SEQUENCE_LENGTH, reset_at_document_boundaries=case.packed),
        training=changed(
            TrainingConfig(
                micro_batch_size=_micro_batch_size(layout),
                global_batch_size=GLOBAL_BATCH_SIZE,
                train_iters=10,
                precision=case.precision,
                loop_schedule=[LoopStage(loop_shares=[1 / case.loops] * case.loops)] if case.step_loops else [],
            ),
            case.training,
        ),
        # With Adam's usual epsilon, an element whose gradient is rounding error moves as far as any other.
        optimizer=OptimizerConfig(**{"lr": 1e-3, "min_lr": 1e-4, "adam_eps": 1e-4, **case.optimizer}),
    )


def _micro_batch_size(layout: Layout) -> int:
    """Two microbatches per pipeline stage, or one on eight ranks and in four stages: their number must not matter."""
    per_stage = 1 if layout.world_size == 8 or layout.pp == 4 else 2
    return GLOBAL_BATCH_SIZE // (layout.dp * per_stage * layout.pp)


def _batches(seed: int, layout: Layout, case: Case) -> list[MicroBatch]:
    return draw_batches(_config(layout, case), seed, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH, VOCAB_SIZE)


def _validation(layout: Layout, case: Case) -> list[MicroBatch]:
    """Half a batch, in a microbatch per pipeline stage."""
    config, samples = _config(layout, case), GLOBAL_BATCH_SIZE // 2
    config.training.micro_batch_size = samples // (layout.dp * layout.pp)
    return draw_batches(config, 100, samples, SEQUENCE_LENGTH, VOCAB_SIZE)


def draw_batches(config: RunConfig, seed: int, samples: int, length: int, vocab_size: int) -> list[MicroBatch]:
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


def _randomized(zero_gates: bool) -> AbstractContextManager[Any]:
    """Have the engine start from random gates and norms, drawn by their names in the whole model."""

    def initialize_all(stage: LoopedGPT, seed: int) -> None:
        initialize(stage, seed)
        randomize_gates_and_norms(stage, zero_gates)
        randomize_biases(stage)

    return mock.patch.object(build, "initialize", initialize_all)


def _small_buckets() -> AbstractContextManager[Any]:
    """Several gradient buckets, although the model is tiny."""
    stock = LayerWiseDistributedOptimizer.compute_full_param_layout

    def small(params: Any, bucket_size: int | None, *args: Any, **kwargs: Any) -> Any:
        return stock(params, None if bucket_size is None else 2000, *args, **kwargs)

    return mock.patch.object(LayerWiseDistributedOptimizer, "compute_full_param_layout", small)


def _observe_reduction(engine: MegatronEngine) -> list[tuple[int, int]]:
    """Note at the end of each backward how many bucket groups are already on their way, of how many."""
    finalize, dispatched = engine._finalize, []

    def observed(*args: Any, **kwargs: Any) -> None:
        groups = engine.ddp.bucket_groups + engine.ddp.expert_parallel_bucket_groups
        dispatched.append((sum(group.grad_reduce_handle is not None for group in groups), len(groups)))
        finalize(*args, **kwargs)

    engine._finalize = observed  # type: ignore[method-assign]
    return dispatched


# ---------------------------------------------------------------- the whole model's parameters


def _gather(stage: LoopedGPT, vocab_size: int = VOCAB_SIZE) -> dict[str, np.ndarray]:
    """Every parameter and buffer of the whole model, on rank 0; replicas are checked to be equal bit for bit."""
    own = [
        (
            name,
            _split_axis(name, parameter),
            parallel_state.get_tensor_model_parallel_rank(),
            parameter.detach().float().numpy().copy(),
        )
        for name, parameter in global_tensors(stage)
    ]
    shards: dict[str, dict[int, np.ndarray]] = {}
    axes: dict[str, int | None] = {}
    for name, axis, tp_rank, value in (entry for entries in _gather_objects(own) for entry in entries):
        axes[name] = axis
        known = shards.setdefault(name, {}).setdefault(0 if axis is None else tp_rank, value)
        assert np.array_equal(known, value), f"replicas of {name} differ"
    whole = {name: _merge(name, axes[name], [parts[rank] for rank in sorted(parts)]) for name, parts in shards.items()}
    tables = [name for name in whole if "word_embeddings" in name or name == "output_layer.weight"]
    return whole | {name: whole[name][:vocab_size] for name in tables}


def _gather_objects(own: Any) -> list[Any]:
    """Every rank's object by rank, on rank 0; none elsewhere."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, everyone if dist.get_rank() == 0 else None)
    return everyone if dist.get_rank() == 0 else []


def _split_axis(name: str, parameter: Tensor) -> int | None:
    if ".mlp.experts." in name or not getattr(parameter, "tensor_model_parallel", False):
        return None
    return parameter.partition_dim  # type: ignore[attr-defined]


def _merge(name: str, axis: int | None, parts: list[np.ndarray]) -> np.ndarray:
    if axis is None:
        return parts[0]
    if name.endswith("linear_fc1.weight"):  # each rank: [its gate rows, its up rows]
        halves = [np.split(part, 2) for part in parts]
        return np.concatenate([half[index] for index in (0, 1) for half in halves])
    return np.concatenate(parts, axis=axis)
