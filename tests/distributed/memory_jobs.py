"""Measure what a rank's training steps hold, byte by byte. These functions run in the pool's workers.

`StorageCounter` sees every operation that torch dispatches, those of autograd and of the optimizer included, and counts
the storages behind what they return until each is really released: parameters, buffers, gradients, what autograd saves,
and the temporaries between operations. That is what a GPU's caching allocator calls "allocated memory", but for scratch
space within one kernel. In one process it is held against torch's own CPU allocator, which reports every allocation to
the profiler, scratch space included; with collectives the profiler is of no use, since gloo releases tensors on threads
of its own, which it does not see. Resident memory would be of no use either: it counts the interpreter and libraries,
and falls when the C library pleases.
"""

from __future__ import annotations

import dataclasses
import gc
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plt_megatron.config.schema import RunConfig
from plt_megatron.model.loop_context import Documents
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.runtime.process_groups import init_process_groups
from plt_megatron.train.build_engine import build_engine
from tests.checkpoints import save_checkpoint

STEPS = 2  # the optimizer's state exists from the first step's end on
UNRELEASED = 1e5  # bytes that may be left when all is dropped
ATTEMPTS = 10
PATIENCE = 60.0  # seconds until gloo's threads have let go


@dataclasses.dataclass
class Measured:
    """Bytes on one rank.

    Attributes:
        stage: the rank's pipeline stage.
        peak: the most that was held at any moment of the last step.
        between_steps: what is held after it.
        released: what is left once everything is dropped; near 0 if every release was seen.
    """

    stage: int
    peak: int
    between_steps: int
    released: int


def measure_all(configs: list[RunConfig], vocab_size: int, await_release: bool = False) -> list[Measured]:
    """Train two steps of each configuration, all of one layout, and report this rank's memory.

    With `await_release`, give gloo's threads up to PATIENCE to let go of everything in the end.
    """
    init_process_groups(configs[0].parallel)
    return [_measure(config, vocab_size, await_release) for config in configs]


class StorageCounter(TorchDispatchMode):
    """Adds up the live storages that operations have returned.

    Attributes:
        held: bytes at this moment.
        peak: the most since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._live: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or size == 0 or storage.device.type == "meta":
            return
        self._live[key] = weakref.finalize(storage, self._release, key, size)
        self.held += size
        self.peak = max(self.peak, self.held)

    def _release(self, key: int, size: int) -> None:
        del self._live[key]
        self.held -= size

    def settle(self, limit: float = 0) -> int:
        """Wait until gloo's threads have let go of what they sent, and return the bytes that are held then.

        A collective's tensors are released by the thread that ran it, some time after its result is there. Without a
        `limit` in bytes to wait for, wait until nothing has been released for a moment.
        """
        deadline, before = time.monotonic() + PATIENCE, -1
        while (self.held > limit if limit else self.held != before) and time.monotonic() < deadline:
            before = self.held
            time.sleep(0.02)  # gives up the interpreter's lock, which a release needs
        return self.held


def _measure(config: RunConfig, vocab_size: int, await_release: bool) -> Measured:
    with StorageCounter() as counter:
        engine = build_engine(config, vocab_size)
        batches = _batches(config, vocab_size)
        for _ in range(STEPS):
            counter.settle()
            counter.peak = counter.held
            engine.train_step(batches)
        peak, between = counter.peak, counter.settle()
        del engine, batches
        _forget()
        left = counter.settle(UNRELEASED if await_release else 0)
    return Measured(parallel_state.get_pipeline_model_parallel_rank(), peak, between, left)


def allocator_peak(config: RunConfig, vocab_size: int) -> int:
    """The same peak as torch's CPU allocator reports it, for a single process.

    The profiler sees one thread. Where gloo's is the last to let go of a tensor, which depends on who else has the
    core, a release is missed and all that follows is too much: then it is measured again.
    """
    init_process_groups(config.parallel)
    for _ in range(ATTEMPTS):
        peak, left = _allocated(config, vocab_size)
        if left < UNRELEASED:
            return peak
    raise AssertionError(f"{left:,} bytes are never released, or gloo's thread has released something {ATTEMPTS} times")


def _allocated(config: RunConfig, vocab_size: int) -> tuple[int, int]:
    """(most bytes in the last step, those left at the end) by the allocations and releases of this thread."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        engine = build_engine(config, vocab_size)
        batches = _batches(config, vocab_size)
        for step in range(STEPS):
            with torch.profiler.record_function(f"step {step}"):
                engine.train_step(batches)
        del engine, batches
        _forget()
    events = profiler.profiler.kineto_results.events()
    ((begin, end),) = ((e.start_ns(), e.end_ns()) for e in events if e.name() == f"step {STEPS - 1}")
    held = peak = 0
    for moment, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        if begin <= moment <= end:
            peak = max(peak, held)
    return peak, held


def _forget() -> None:
    """Free reference cycles and what functions have cached."""
    from plt_megatron.model.torch_attention import _causal_bias

    _causal_bias.cache_clear()
    gc.collect()


def _batches(config: RunConfig, vocab_size: int) -> list[MicroBatch]:
    rows, length = config.training.micro_batch_size, config.data.sequence_length
    count = config.training.global_batch_size // (rows * parallel_state.get_data_parallel_world_size())
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
        starts = torch.rand((rows, length), generator=generator) < 0.02
        packed = config.data.reset_at_document_boundaries
        batches.append(
            MicroBatch(
                tokens=tokens[:, :-1].contiguous(),
                labels=tokens[:, 1:].contiguous(),
                loss_mask=torch.ones(rows, length),
                document_starts=starts if packed else None,
                position_ids=Documents(starts).position_ids if packed else None,
            )
        )
    return batches


def checkpoint_size(config: RunConfig, vocab_size: int, folder: str) -> int:
    """Bytes on disk of one checkpoint."""
    init_process_groups(config.parallel)
    engine = build_engine(config, vocab_size)
    engine.train_step(_batches(config, vocab_size))
    path = save_checkpoint(engine, Path(folder), {"step": 1})
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def megatron_schedule(pipeline: int, loops: int, microbatches: int) -> tuple[list[tuple[int, int]], list[int]]:
    """megatron-core's interleaved order of (microbatch, chunk), and each stage's passes before its steady state."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    warmups = []
    for stage in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda stage=stage: stage)
        communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=loops)
        counts = get_pp_rank_microbatches(microbatches, loops, pipeline, p2p_communicator=communicator)
        warmups.append(counts[2])
    return get_schedule_table(microbatches, loops, pipeline), warmups
