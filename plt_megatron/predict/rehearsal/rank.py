"""Rehearsal of one rank: its part of the model, a training step, a validation step, and its stage's part of a save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from plt_megatron.config.layout import layout_of, num_microbatches
from plt_megatron.config.schema import RunConfig
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.predict.layout import enough_microbatches
from plt_megatron.predict.rehearsal.fakes import balance_routing, fake_gpu, groups_made, join_fake_world
from plt_megatron.predict.rehearsal.observer import Observer
from plt_megatron.predict.rehearsal.record import RankRecord
from plt_megatron.runtime.process_groups import init_process_groups
from plt_megatron.train.build_engine import build_engine
from plt_megatron.train.callbacks.weight_ema import WeightAverage
from plt_megatron.train.engine import StepTimes
from plt_megatron.train.megatron_engine import MegatronEngine


def rehearse_rank(
    config: RunConfig, vocab_size: int, rank: int, world_size: int, prepare: Callable[[int], None] | None = None
) -> RankRecord:
    """Rehearse `rank` and return its record, in a process that does nothing else before or after.

    `prepare` is called with the rank once its process groups exist (tests seed faults with it).
    """
    started = time.perf_counter()
    observer = Observer()
    join_fake_world(rank, world_size, observer.log)
    init_process_groups(config.parallel)
    if prepare is not None:
        prepare(rank)
    layout = layout_of(config, world_size)
    record = RankRecord(rank, layout.coordinates(rank), groups_made=dict(groups_made))
    if config.model.moe is not None:
        balance_routing(observer)
    with fake_gpu(observer):
        engine = build_engine(config, vocab_size)
        assert isinstance(engine, MegatronEngine)
        _average = _name_memory(engine, observer)  # held through the step
        _mark_phases(engine, observer, record)
        count = num_microbatches(config, world_size)
        record.microbatches = enough_microbatches(layout.pipeline, count)
        if config.parallel.overlap_grad_reduce:  # the first step reduces differently from all later ones
            engine.train_step(_batches(config, layout.pipeline))
        batches = _batches(config, record.microbatches)
        observer.name_held("inputs", (each for batch in batches for each in vars(batch).values()))
        _measure_step(engine, batches, observer, record)
        observer.log.phase = "validation"
        engine.evaluate(_batches(config, layout.pipeline), config.model.loop_count)
    record.calls, record.groups = observer.log.calls, observer.log.groups
    record.waits = dict(observer.waits)
    if config.checkpoint.enabled and rank % layout.ranks_per_stage == 0:
        from plt_megatron.predict.rehearsal.saving import plan_saving

        record.saving = plan_saving(engine, layout, rank)
    record.seconds = time.perf_counter() - started
    return record


def _measure_step(engine: MegatronEngine, batches: list[MicroBatch], observer: Observer, record: RankRecord) -> None:
    observer.log.calls.clear()
    observer.log.work = 0
    observer.flops.clear()
    observer.waits.clear()
    observer.forget_peak()
    engine.train_step(batches)
    record.memory = {name: size for name, size in observer.peak.items() if size > 0}
    record.peak_phase, record.flops = observer.peak_phase, dict(observer.flops)


def _batches(config: RunConfig, count: int) -> list[MicroBatch]:
    """Return microbatches as `RunData` yields them on this rank."""
    shape = config.training.micro_batch_size, config.data.sequence_length
    device = torch.cuda.current_device()
    return [
        MicroBatch(
            tokens=torch.zeros(shape, dtype=torch.int64, device=device),
            labels=torch.zeros(shape, dtype=torch.int64, device=device),
            loss_mask=torch.ones(shape, device=device),
        )
        for _ in range(count)
    ]


def _name_memory(engine: MegatronEngine, observer: Observer) -> WeightAverage | None:
    """Name what the engine holds, and allocate optimizer state, as loading a checkpoint does and a first step would.
    Return the moving average that the run would hold beside the engine, if any."""
    for part in engine.state.parts:
        part.allocate()
        main = [each for group in part.inner.param_groups for each in group["params"]]
        observer.name_held("main weights", main)
        observer.name_held("optimizer state", (each for main_ in main for each in part.inner.state[main_].values()))
    buffers = [*engine.ddp.buffers, *engine.ddp.expert_parallel_buffers]
    observer.name_held("gradients", (buffer.grad_data for buffer in buffers))
    observer.name_held("weights", [*engine.stage.parameters(), *(buffer.param_data for buffer in buffers)])
    if engine.config.training.ema_decay is None:
        return None
    average = WeightAverage(engine)
    observer.name_held("weight average", average.tensors())
    return average


def _mark_phases(engine: MegatronEngine, observer: Observer, record: RankRecord) -> None:
    """Tell the observer which phase the engine is in, without changing what the engine does."""
    engine.times = _Phases(observer)
    stage = engine.stage
    for layer in stage.decoder.layers:
        shared = getattr(layer.mlp, "shared_experts", None)
        for module in filter(None, (layer, layer.self_attention.core_attention, layer.mlp, shared)):
            module.register_forward_pre_hook(lambda *_: observer.enter_layer())
            module.register_forward_hook(lambda *_: observer.leave_layer())
    run_loop, embed, run_layer_by_layer = stage.run_loop, stage.embed, stage._run_layer_by_layer

    def enter(context: Any) -> bool:
        in_step = observer.log.phase != "validation"
        if in_step:
            observer.log.phase = f"forward {context.loop}"
        return in_step

    def embedded(batch: Any, context: Any) -> Any:
        enter(context)  # a prelude runs before the first loop, possibly after another microbatch's backward
        return embed(batch, context)

    def marked(run: Callable[..., Any], batch: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        in_step = enter(context)
        out = run(batch, context, *args, **kwargs)
        if in_step and out.requires_grad:
            out.register_hook(lambda grad: setattr(observer.log, "phase", f"backward {context.loop}"))
        record.shapes[f"loop {context.loop}'s output"] = f"{list(out.shape)} {str(out.dtype).removeprefix('torch.')}"
        return out

    stage.run_loop, stage.embed = partial(marked, run_loop), embedded  # type: ignore[method-assign]
    # Layer by layer, the loops take turns: a microbatch has one phase each way, numbered 1.
    stage._run_layer_by_layer = partial(marked, run_layer_by_layer)  # type: ignore[method-assign]


class _Phases(StepTimes):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        log = self.observer.log
        log.phase = name.replace("_", " ")
        yield
        log.phase = "loss" if name == "gradient_reduction" else "between steps"
